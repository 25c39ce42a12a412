"""`minigpt4 web` as a process, from its start to its end."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

RUN = "from minigpt4_runtime.cli.main import run; run()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_no_picture(tmp_path, number):
    folders = {"TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "web", "--port", "0", "--url", "http://127.0.0.1:9"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | folders,
    )  # fmt: skip
    url = process.stdout.readline().strip()
    assert httpx.get(url).status_code == 200
    sent = {"files": ("a.png", b"a picture")}
    assert httpx.post(f"{url}/gradio_api/upload", files=sent).status_code == 200
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert not list(tmp_path.rglob("a.png"))
    assert not list(tmp_path.glob("minigpt4-pictures-*"))
