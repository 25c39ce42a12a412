"""The command in this process or in one of its own, with a model that needs no torch."""

import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fake_api
import pytest
from picture_site import Site

FAKE = [sys.executable, str(Path(__file__).with_name("fake_api.py"))]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def real_minigpt4(monkeypatch, capsys):
    """Runs the command in this process: `real_minigpt4("describe", "cat.png")`.

    `given` is its standard input, as text or as bytes.
    """

    def invoke(*arguments, given=""):
        from minigpt4_runtime.cli.main import run

        stdin = io.BytesIO(given.encode() if isinstance(given, str) else given)
        monkeypatch.setattr(sys, "argv", ["minigpt4", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            run()
        out, err = capsys.readouterr()
        return Outcome(ending.value.code or 0, out, err)

    return invoke


@pytest.fixture
def minigpt4(monkeypatch, real_minigpt4):
    """The same, with the fake model in place of the real one."""
    monkeypatch.setitem(sys.modules, "minigpt4_runtime.api", fake_api.as_module())
    fake_api.FakeMiniGPT4.loaded.clear()
    fake_api.FakeMiniGPT4.raw.clear()
    return real_minigpt4


@pytest.fixture
def start():
    """Starts the command with the fake model as a process; ends it with the test.

    `seconds` is how long the model takes for a word.
    """
    running = []

    def start_process(*arguments, seconds=0, **settings):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(
            [*FAKE, *map(str, arguments)],
            env=fake_api.environment(FAKE_SECONDS=seconds),
            **({"encoding": "utf-8"} | pipes | settings),
        )
        running.append(process)
        return process

    yield start_process
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def site(folder):
    """A site on this machine with a.png under every path; as text it is its address."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"
    site = Site(head + (folder / "a.png").read_bytes())
    yield site
    site.close()


@pytest.fixture
def bad_picture(folder):
    path = folder / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return path
