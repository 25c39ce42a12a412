"""What the README shows is true: its code runs, its commands and files exist."""

import re
import shlex
from pathlib import Path

import pytest

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


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^[\w ]*\b{target}\b[\w ]*:", makefile, flags=re.MULTILINE), target
