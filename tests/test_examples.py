"""Every example runs as its own docstring says."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def command_of(example: Path) -> list[str]:
    """The arguments in the docstring's command line; optional ones in brackets are left out."""
    lines = example.read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if line.startswith(f"python examples/{example.name}")]
    return [word for word in shlex.split(command)[2:] if not word.startswith("[")]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(example), *command_of(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
