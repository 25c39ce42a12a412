"""`minigpt4 web` and `serve` as processes, from their start to their end."""

import asyncio
import os
import signal
import subprocess
import sys

import httpx

from minigpt4_runtime.web.page import build_page

RUN = "from minigpt4_runtime.cli.main import run; run()"


def start(*arguments, **variables):
    """Start a command; gives the process and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | variables,
    )  # fmt: skip
    return process, process.stdout.readline().strip()


def assert_no_site_can_pass_for_this_machine(url):
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403


def test_a_signal_ends_it_and_leaves_no_picture(tmp_path):
    folders = {"TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    process, url = start("web", "--url", "http://127.0.0.1:9", **folders)
    assert_no_site_can_pass_for_this_machine(url)
    sent = {"files": ("a.png", b"a picture")}
    assert httpx.post(f"{url}/gradio_api/upload", files=sent).status_code == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert not list(tmp_path.rglob("a.png"))
    assert not list(tmp_path.glob("minigpt4-pictures-*"))


def test_an_idle_page_looks_for_questions_fifty_times_a_second(monkeypatch):
    waits = []

    async def poll():
        queue = build_page(None, [])._queue

        async def wait(seconds):
            waits.append(seconds)
            queue.stopped = len(waits) == 3

        monkeypatch.setattr(asyncio, "sleep", wait)
        await queue.start_processing()

    asyncio.run(poll())
    assert waits == [0.02] * 3


def test_an_open_page_is_no_error_when_the_server_ends():
    process, url = start("serve", "--ui")
    assert_no_site_can_pass_for_this_machine(url)
    with httpx.stream("GET", f"{url}/gradio_api/heartbeat/a", timeout=60) as beat:
        assert beat.status_code == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Exception" not in err
    assert "draining" in err
