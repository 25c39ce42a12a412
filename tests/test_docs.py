"""What the pages in docs/ show is true: their commands exist with their flags, their code runs."""

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["benchmarking.md", "evaluating.md", "migrating.md"]
REFERENCE = (DOCS / "cli.md").read_text(encoding="utf-8")


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


COMMANDS = sorted({
    line
    for page in PAGES
    for block in blocks(page, "")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("minigpt4 ")
})  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_flags(command):
    _, *words = shlex.split(command)
    names = [" ".join(words[:count]) for count in (2, 1)]
    sections = (re.search(rf"^## minigpt4 {name}$(.*?)(?=^## |\Z)", REFERENCE,
                          flags=re.DOTALL | re.MULTILINE) for name in names)  # fmt: skip
    section = next(filter(None, sections), None)
    assert section, f"docs/cli.md has no command {command}"
    for flag in (word for word in words if word.startswith("-")):
        assert f"`{flag} " in section[1] or f"`{flag}`" in section[1], f"{command} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    if page == "evaluating.md":
        assert "after against before" in capsys.readouterr().out
        assert (tmp_path / "parity.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target
