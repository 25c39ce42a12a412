"""`minigpt4 quantise`: both spellings, what it prints, and Ctrl-C."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"


@pytest.mark.parametrize("spelling", ["quantise", "quantize"])
def test_the_command_in_both_spellings(spelling, real_minigpt4, tmp_path):
    given = (spelling, DEMO_DIR, "--format", "w4a16", "--out", tmp_path / "out")
    done = real_minigpt4(*given, "--group-size", 32, "--head", "keep", "--image-side", "w8a8")
    assert (done.status, done.out.strip()) == (0, str(tmp_path / "out"))
    assert (
        "w4a16-g32 in language.layers, w8a8 in vision, float in vision.vit.patch_embedding and "
        "vision.projection and elsewhere." in done.err
    )
    assert f"--model {tmp_path / 'out'}" in done.err
    again = real_minigpt4(*given)
    assert again.status == 1
    assert again.err.startswith("error: ")
    assert "--force" in again.err
    alone = real_minigpt4(*given, "--force", "--method", "awq")
    assert alone.status == 1
    assert "error: --method is awq, and there is nothing to read: give --calibrate." in alone.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_leaves_nothing(tmp_path):
    code = """
        import os, signal
        from minigpt4_runtime.checkpoint import writer
        from minigpt4_runtime.cli.main import run
        signal.signal(signal.SIGINT, signal.default_int_handler)
        real, calls = writer._write_one, []
        def write(*args, **kwargs):
            calls.append(1)
            if len(calls) == 9:
                os.kill(os.getpid(), signal.SIGINT)
            real(*args, **kwargs)
        writer._write_one = write
        run()
    """
    given = ["quantise", str(DEMO_DIR), "--format", "w8a8", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *given],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 130
    assert "No half model was left behind" in done.stderr
    assert not list(tmp_path.iterdir())
