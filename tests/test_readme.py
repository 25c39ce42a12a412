"""What the README shows is true: its code runs, its commands and files exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.quantise.choice import QuantisePlan, choose

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.removeprefix("$ ").removeprefix(".venv/bin/")
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if "minigpt4 " in line and not line.startswith((">", "├", "└"))
]


def test_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = [block for language, block in BLOCKS if language == "python"]
    assert code
    names = {}  # A later block goes on with what an earlier one has made.
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "There are three shapes" in out
    assert "1 no such file.png does not exist" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_flags(command):
    program, name, *arguments = shlex.split(command)
    assert program == "minigpt4"
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    if f"## minigpt4 {name} {arguments[0]}\n" in reference:  # A command of a group.
        name = f"{name} {arguments.pop(0)}"
    section = re.search(rf"^## `?minigpt4 {name}`?$(.*?)(?=^## |\Z)", reference,
                        flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    assert section, f"docs/cli.md has no command {name}"
    for flag in (argument for argument in arguments if argument.startswith("-")):
        assert re.search(rf"{flag}\b", section[1]), f"minigpt4 {name} has no {flag}"


def test_every_way_to_judge_is_named():
    reference, page = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("cli.md", "evaluating.md")
    )
    for name in re.findall(r"^## minigpt4 evaluate (\w+)$", reference, flags=re.MULTILINE):
        assert re.search(rf"^\| .* \| `evaluate {name}` \|", page, flags=re.MULTILINE), name


def test_it_is_short():
    """What a page of its own explains is said there. See docs/."""
    assert len(README.splitlines()) < 280


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^[\w ]*\b{target}\b[\w ]*:", makefile, flags=re.MULTILINE), target


SMALLER = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
ROWS = [
    line
    for line in (*README.splitlines(), *SMALLER.splitlines())
    if re.match(r"\| `(vicuna-\d+b|llama2-7b|minigpt-v2)` \|", line)
]


@pytest.mark.parametrize("row", ROWS)
def test_sizes_are_those_of_the_shapes(row):
    name, first, second, *sizes = (cell.strip() for cell in row.strip("|").split("|"))
    name = name.strip("`")
    if len(sizes) == 2:
        ways = [(dtype, "float") for dtype in second.split(", ")]
    else:
        sizes = [second, *sizes]
        given, _, group_size = first.partition("`--group-size ")
        size = int(group_size.strip("`")) if group_size else None
        plans = [QuantisePlan(weights=each.strip(), group_size=size) for each in given.split(",")]
        ways = [("float16", choose(plan, PRESETS[name])) for plan in plans]
    for dtype, formats in ways:
        found = [of(name, dtype, formats) for of in (weight_bytes, running_bytes)]
        assert [show_bytes(each) for each in found] == sizes[-2:]


def test_as_many_checkpoints_as_are_compared_with_the_original():
    (number,) = re.findall(r"converts (\w+) small checkpoints", README)
    compared = list((ROOT / "tests" / "goldens").glob("*/cases.json"))
    assert ["five", "six", "seven", "eight"].index(number) + 5 == len(compared)


def test_make_installs_the_extras_that_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (inner,) = re.findall(r"minigpt4-runtime\[(.*)\]", project["optional-dependencies"]["dev"][0])
    named = set(re.findall(r"-e '\.\[(\w+)\]'", README))
    assert named - set(inner.split(",")) == {"structured"}  # It comes with server.
    assert "-e '.[dev]'" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_of_torch_is_that_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", constraints, flags=re.MULTILINE)
    assert f"torch=={version}\n" in README
    assert f"which would install {version})" in README


def test_the_first_lines_have_the_speeds_of_the_table():
    before, _, after = README.partition("## How fast is it?")
    for row, pattern in (
        (r"pictures to answers of 32 tokens.*float32 \| the original's code", r"([\d.]+) times as"),
        (
            r"the same in 8 bits \| the original's code, float32",
            r"([\d.]+) times with weights of 8",
        ),
    ):
        (least,) = re.findall(rf"^\| {row} \| ([\d.]+) /", after, flags=re.MULTILINE)
        assert re.findall(pattern, before) == [least]


def test_the_cpu_kernels_are_built_as_make_builds_them():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in ("scikit-build-core cmake ninja", "--no-deps --no-build-isolation ./kernels"):
        for page in ("README.md", "kernels/README.md"):
            assert words in (ROOT / page).read_text(encoding="utf-8"), page
        assert words in makefile
