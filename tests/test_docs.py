"""What the pages show is true: their commands exist with their flags, their code runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.name != "cli.md"  # It is made by a script, and has a test of its own.
)
REFERENCE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
# The code of docs/serving.md runs in tests/server, and that of docs/export.md needs a real model.
PAGES_WITH_CODE = ["docs/benchmarking.md", "docs/evaluating.md", "docs/migrating.md"]
TIME = re.compile(r"(?<![\w.])\d[\d.,]* ?(?:s|ms|seconds|minutes|hours)\b")
# Settings and promises. A measured time is one only beside the GPU that took it.
TIMES_THAT_NOBODY_MEASURED = {"30 ms", "0.4 s", "50 ms", "0.5 ms"}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def prose(page):
    return re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)


def commands_of(page):
    """Those that stand in blocks, and those within a sentence that have a flag."""
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    yield from (line for line in lines if line.startswith("minigpt4 "))
    yield from re.findall(r"`(minigpt4 [a-z][^`]* -[^`]+)`", prose(page))


def anchors(page):
    """What can stand after a # in a link to this page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The commands of the README, which look otherwise, are in tests/test_readme.py.
COMMANDS = sorted({
    command for page in PAGES if not page.startswith("README") for command in commands_of(page)
})  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_flags(command):
    _, *words = shlex.split(command)
    names = [" ".join(words[:count]) for count in (2, 1)]
    sections = (re.search(rf"^## minigpt4 ({name})\n+`minigpt4 {name}(.*?)` *\n(.*?)(?=^## |\Z)",
                          REFERENCE, flags=re.DOTALL | re.MULTILINE) for name in names)  # fmt: skip
    section = next(filter(None, sections), None)
    assert section, f"docs/cli.md has no command {command}"
    name, usage, _ = section.groups()
    first = words[len(name.split()) :][:1]
    assert usage != " [OPTIONS]" or not first or first[0].startswith("-"), (
        f"{name} takes no {first}"
    )
    for flag in (word for word in words if word.startswith("-")):
        assert f"`{flag} " in section[3] or f"`{flag}`" in section[3], f"{command} has no {flag}"


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    if page == "docs/evaluating.md":
        assert "after against before" in capsys.readouterr().out
        assert (tmp_path / "parity.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_code_about_the_engine_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # It names an example picture.
    for block in blocks("docs/engine.md", "python"):
        exec(compile(block, "docs/engine.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"^[1-9]\d* pictures have left the window\.$", said, re.MULTILINE)
    assert re.search(r"^\(-\d+\.\d+, -", said, re.MULTILINE)  # The scores.


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        "docs/cli.md",
        "kernels/README.md",
        "integrations/README.md",
        "tests/goldens/README.md",
    ],
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        found = (ROOT / page).parent / name if name else ROOT / page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.relative_to(ROOT)), target


@pytest.mark.parametrize("page", ["docs/benchmarking.md", "docs/evaluating.md", "docs/log.md",
                                  "docs/performance.md"])  # fmt: skip
def test_a_time_is_a_share_or_a_ratio(page):
    for section in re.split(r"^## ", read(page), flags=re.MULTILINE):
        if "NVIDIA" not in section:
            assert set(TIME.findall(section)) <= TIMES_THAT_NOBODY_MEASURED, section
