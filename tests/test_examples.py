"""Every example runs as its own docstring says."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Those of Ray are run by tests/cluster/test_ray_examples.py.
WITHOUT_RAY = [path for path in EXAMPLES if not path.name.startswith("ray_")]
SERVER = "http://127.0.0.1:8000"
SHOWN = {
    "batch.py": "four.png: There are four shapes",
    "client.py": "The triangle is at the top right.",
    "describe.py": "There are three shapes",
    "dialogue.py": "The ring is pink.",
}


def command_of(example: Path) -> list[str]:
    """The arguments in the docstring's command line; optional ones in brackets are left out."""
    lines = example.read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if line.startswith(f"python examples/{example.name}")]
    return [word for word in shlex.split(command)[2:] if not word.startswith("[")]


@pytest.fixture
def url():
    """The address of a server, on a port that is free."""
    command = [sys.executable, "-m", "minigpt4_runtime.cli.main", "serve", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, encoding="utf-8") as process:
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.mark.parametrize("example", WITHOUT_RAY, ids=lambda path: path.name)
def test_example_runs(example, monkeypatch, capsys, request):
    arguments = command_of(example)
    if SERVER in arguments:
        arguments[arguments.index(SERVER)] = request.getfixturevalue("url")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out.strip()
    assert out
    assert SHOWN.get(example.name, "") in out


def test_one_example_asks_a_server():
    assert any(SERVER in command_of(example) for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
