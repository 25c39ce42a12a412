"""Exit statuses, and what stands on stdout and stderr when something is wrong."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_api import environment

from minigpt4_runtime import __version__, errors
from minigpt4_runtime.cli.terminal import note

DEV_FULL = Path("/dev/full")
FAKE_API = Path(__file__).with_name("fake_api.py")
COMMANDS = ["describe", "chat", "convert", "inspect", "demo", "evaluate"]


def run_python(*arguments, **settings):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **settings
    )


def test_help_lists_the_commands(minigpt4):
    shown = minigpt4("--help")
    assert shown.status == 0
    assert shown.err == ""
    for command in COMMANDS:
        assert f"\n  {command} " in shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(minigpt4, command):
    shown = minigpt4(command, "-h")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.startswith(f"Usage: minigpt4 {command}")


@pytest.mark.parametrize("group", ["", "evaluate", "bench", "export"])
def test_a_list_of_commands_cuts_no_line_short(minigpt4, group):
    assert "..." not in minigpt4(*group.split(), "--help").out.split("Commands:")[1]


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "minigpt4_runtime", "--version"]
    assert __version__ in subprocess.check_output(command, text=True)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['minigpt4', '--help']\n"
        "from minigpt4_runtime.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'sentencepiece', 'safetensors', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    assert run_python("-c", code).stderr == "[]\n"


def test_version(minigpt4):
    shown = minigpt4("--version")
    assert (shown.status, shown.out, shown.err) == (0, f"minigpt4-runtime {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [(), ("paint",), ("describe",), ("describe", "a.png", "--top-k", "x"), ("chat", "--colour")],
)
def test_wrong_usage_is_status_2(minigpt4, arguments):
    shown = minigpt4(*arguments)
    assert (shown.status, shown.out) == (2, "")
    assert "Usage: minigpt4" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature=-1",), "temperature is -1.0; it must be a number ≥ 0."),
        (("--temperature", "nan"), "temperature is nan; it must be a number ≥ 0."),
        (("--top-p", "0"), "top_p is 0.0; it must be above 0 and at most 1."),
        (("--max-new-tokens", "0"), "max_new_tokens is 0; it must be a whole number ≥ 1."),
        (("--dtype", "int4"), "dtype is 'int4'"),
    ],
)
@pytest.mark.parametrize("command", ["describe", "chat"])
def test_a_bad_setting_is_one_line_and_status_1(minigpt4, folder, command, arguments, message):
    shown = minigpt4(command, "a.png", "--model", "somewhere", *arguments)
    assert (shown.status, shown.out, shown.err) == (1, "", f"error: {message}\n")


ERROR_TYPES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MiniGPT4Error)
]


@pytest.mark.parametrize("kind", ERROR_TYPES, ids=lambda kind: kind.__name__)
def test_every_error_of_ours_is_one_line_and_status_1(minigpt4, monkeypatch, folder, kind):
    numbers = (5, 4) if kind.__name__ == "PromptTooLongError" else ("It will not do.",)
    error = kind(*numbers)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("fake_api.FakeMiniGPT4.load", refuse)
    shown = minigpt4("describe", "a.png", "b.jpg", "--model", "somewhere")
    assert (shown.status, shown.out, shown.err) == (1, "", f"error: {error}\n")


def test_debug_shows_the_traceback_wherever_it_stands(minigpt4, folder):
    for arguments in (("--debug", "chat", "no.png"), ("chat", "no.png", "--debug")):
        shown = minigpt4(*arguments)
        assert shown.status == 1
        assert shown.err.startswith("Traceback")
        assert shown.err.endswith("error: no.png does not exist. Check the path.\n")


def test_after_two_dashes_debug_is_a_file(minigpt4, folder):
    shown = minigpt4("describe", "--", "--debug")
    assert shown.err == "error: --debug does not exist.\n"


def test_a_bug_says_that_it_is_one(minigpt4, folder):
    shown = minigpt4("describe", "a.png", "--prompt", "crash")
    assert (shown.status, shown.out) == (1, "")
    assert "error: KeyError: 'crash'\nThis is a bug in minigpt4" in shown.err
    assert "Traceback" not in shown.err
    assert "Traceback" in minigpt4("--debug", "describe", "a.png", "--prompt", "crash").err


@pytest.mark.parametrize("interrupted", ["load", "describe"])
def test_ctrl_c_is_status_130_and_silent(minigpt4, monkeypatch, folder, interrupted):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fake_api.FakeMiniGPT4.{interrupted}", interrupt)
    shown = minigpt4("describe", "a.png", "--model", "somewhere")
    assert (shown.status, shown.out, shown.err) == (130, "", "")


def test_ctrl_c_that_an_import_turned_into_an_error(minigpt4, monkeypatch, folder):
    def interrupt(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    monkeypatch.setattr("fake_api.FakeMiniGPT4.load", interrupt)
    shown = minigpt4("describe", "a.png", "--model", "somewhere")
    assert (shown.status, shown.out, shown.err) == (130, "", "")


def test_a_reader_that_stops_listening_is_no_error(start, folder):
    command = start("describe", *["a.png", "b.jpg"], "--model", "x", seconds=0.1)
    assert command.stdout.readline() == "a.png: Describe this image in detail. a.png turn 1\n"
    command.stdout.close()
    assert command.wait(timeout=60) == 1
    assert command.stderr.read() == "2 described, 0 failed\n"


@pytest.mark.skipif(not DEV_FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(start, folder):
    with DEV_FULL.open("w") as full:
        command = start("describe", "a.png", "--model", "x", stdout=full)
        assert command.wait(timeout=60) == 1
    assert command.stderr.read() == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not DEV_FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version"])
def test_short_output_that_cannot_be_written_is_one_line(start, folder, command):
    with DEV_FULL.open("w") as full:
        shown = start(command, stdout=full)
        assert shown.wait(timeout=60) == 1
    assert shown.stderr.read() == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
@pytest.mark.parametrize("ending", [">&-", "| true"])
def test_output_that_nobody_takes_gives_no_traceback(folder, ending):
    code = f"{sys.executable} -m minigpt4_runtime.cli.main --help {ending}"
    shown = subprocess.run(code, shell=True, capture_output=True, text=True, env=environment())
    assert shown.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
def test_a_closed_stderr_takes_neither_the_answers_place_nor_the_command_down(folder):
    code = f"{sys.executable} {FAKE_API} describe a.png b.jpg 2>&-"
    shown = subprocess.run(code, shell=True, capture_output=True, text=True, env=environment())
    assert [line.split(":")[0] for line in shown.stdout.splitlines()] == ["a.png", "b.jpg"]
    assert shown.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
def test_a_closed_stdin_is_an_empty_one(folder):
    code = f"{sys.executable} {FAKE_API} chat a.png --model x <&-"
    shown = subprocess.run(code, shell=True, capture_output=True, text=True, env=environment())
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")


def test_a_note_is_one_write(monkeypatch):
    writes = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=writes.append, flush=lambda: None))
    note("One line, whoever else is writing.")
    assert writes == ["One line, whoever else is writing.\n"]


@pytest.mark.skipif(not DEV_FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("kind", ["CheckpointError", "OSError"])
@pytest.mark.parametrize("ending", [">/dev/full", ">&-", "| true"])
def test_an_error_is_told_whatever_becomes_of_stdout(tmp_path, kind, ending):
    script = tmp_path / "fail.py"
    script.write_text(
        "from minigpt4_runtime.cli import main\n"
        "from minigpt4_runtime.errors import CheckpointError\n"
        "def fail(**_):\n"
        "    print('Some words.')\n"
        f"    raise {kind}('It is gone.')\n"
        "main.app = fail\n"
        "main.run()\n"
    )
    env = {name: text for name, text in environment().items() if name != "PYTHONUNBUFFERED"}
    code = f"{sys.executable} {script} {ending}"
    shown = subprocess.run(code, shell=True, capture_output=True, text=True, env=env)
    assert shown.stderr == "error: It is gone.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_a_real_ctrl_c(start, folder):
    command = start("describe", "a.png", "--out", "r.jsonl", seconds=5)
    assert "demo model" in command.stderr.readline()
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 130
    assert command.stderr.read() == ""


def test_warnings_of_libraries_are_not_shown(start, folder):
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        "import fake_api, warnings\n"
        "sys.modules['minigpt4_runtime.api'] = fake_api.as_module()\n"
        "Fake = fake_api.FakeMiniGPT4\n"
        "Fake.load = lambda *_, **__: warnings.warn('x') or Fake()\n"
        "from minigpt4_runtime.cli.main import run\n"
        "run()"
    )
    shown = run_python("-c", code, "describe", "a.png", "--model", "x", env=environment())
    assert (shown.returncode, shown.stderr) == (0, "")
