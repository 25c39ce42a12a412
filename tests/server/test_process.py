"""The process from its start to its end: drains, failures, and the exit status of each."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from running import NAME, long_answer, user, wait_for

SERVER = Path(__file__).with_name("failing_server.py")
LONG_PROMPT = "How many shapes are there, and where is each of them in the picture? " * 3


class Process:
    """`minigpt4 serve` as it is started from a shell."""

    def __init__(self, how, *arguments):
        command = [sys.executable, str(SERVER), how, "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.url = self.process.stdout.readline().strip()
        wait_for(lambda: httpx.get(f"{self.url}/ready").status_code == 200)

    def ask(self, content="hi", **body):
        asked = {"model": NAME, "messages": [user(content)]} | body
        return httpx.post(f"{self.url}/v1/chat/completions", json=asked, timeout=60)

    def ask_in_thread(self, *arguments, **body):
        answers = []

        def ask():
            with contextlib.suppress(httpx.RemoteProtocolError):  # A server may end in between.
                answers.append(self.ask(*arguments, **body))

        thread = threading.Thread(target=ask)
        thread.start()
        return thread, answers

    def end(self, seconds=60):
        """The exit status and the log."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err

    def num_admitted(self):
        text = httpx.get(f"{self.url}/metrics").text
        return float(text.partition("\nminigpt4_admitted ")[2].split()[0])


@pytest.fixture
def serve():
    started = []

    def start(*arguments):
        started.append(Process(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_sigterm_lets_answers_end_and_nobody_in(serve):
    server = serve("none", "--grace-seconds", "60", "--log-format", "json")
    thread, answers = server.ask_in_thread(**long_answer(max_tokens=200, min_tokens=200))
    wait_for(lambda: server.num_admitted() == 1)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    late = server.ask()
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "shutting_down"
    assert "retry-after" in late.headers
    assert httpx.get(f"{server.url}/health").status_code == 200
    thread.join()
    assert answers[0].text.endswith("data: [DONE]\n\n")
    status, err = server.end()
    assert status == 0
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert "draining" in [line["event"] for line in lines]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_url_that_cannot_be_written_is_said_in_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minigpt4_runtime.cli.main", "serve", "--port", "0"],
            stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    demo, error = done.stderr.splitlines()
    assert demo.startswith("The demo model answers")
    assert error.startswith("error: ")
    assert "No space left on device" in error


def test_the_grace_period_ends_what_does_not_end(serve):
    server = serve("none", "--grace-seconds", "0.3")
    thread, answers = server.ask_in_thread(**long_answer())
    wait_for(lambda: server.num_admitted() == 1)
    server.process.send_signal(signal.SIGTERM)
    thread.join()
    assert "shut down before this answer ended" in answers[0].text
    assert server.end()[0] == 0


def test_a_second_signal_waits_for_nobody(serve):
    server = serve("none", "--grace-seconds", "600")
    thread, _ = server.ask_in_thread(**long_answer())
    wait_for(lambda: server.num_admitted() == 1)
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    server.process.send_signal(signal.SIGINT)
    assert server.end()[0] == 0
    thread.join()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("how", ["stick", "break", "die"])
def test_a_failed_engine_ends_the_process(serve, how, stream):
    """A running request hears of it, and the exit status is 1: nothing hangs."""
    server = serve(how, "--stall-seconds", "1")
    answer = server.ask(LONG_PROMPT, stream=stream)
    assert answer.status_code in ((200, 500, 503) if stream else (500, 503))
    assert '"error"' in answer.text
    status, err = server.end()
    assert status == 1
    assert "engine failed" in err


def test_one_failed_step_is_got_over(serve):
    server = serve("once", "--stall-seconds", "20")
    assert server.ask(LONG_PROMPT).status_code == 500
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    assert server.ask(LONG_PROMPT).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0
