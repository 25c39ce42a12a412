"""The process from its start to its end: drains, failures, and the exit status of each."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from running import NAME, Running, long_answer, user, wait_for

from minigpt4_runtime.server import listen
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

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
        self.client = httpx.Client(base_url=self.url, timeout=60)
        wait_for(lambda: self.client.get("/ready").status_code == 200)

    def ask(self, content="hi", **body):
        return self.client.post("/v1/chat/completions", json=asked(content, **body))

    def end(self, seconds=60):
        """The exit status and the log."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err

    def num_admitted(self):
        text = self.client.get("/metrics").text
        return float(text.partition("\nminigpt4_admitted ")[2].split()[0])


def asked(content, **body):
    return {"model": NAME, "messages": [user(content)]} | body


@pytest.fixture
def serve():
    started = []

    def start(*arguments):
        started.append(Process(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.client.close()
        each.process.kill()
        each.process.communicate()


def tell_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


def serve_here(model, grace_seconds, talk):
    """Serve in this thread, which signals reach, while `talk(server)` runs in another.

    Gives the exit status, and what `talk` gives.
    """
    app = create_app(model, ServerConfig(model_name=NAME))
    listener = listen.bind("127.0.0.1", 0)
    talking = []

    def talk_or_end():
        try:
            return talk(Running(listen.url_of(listener), app))
        except BaseException:
            tell_to_end()
            raise

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ThreadPoolExecutor() as pool:
        status = asyncio.run(listen.serve(
            app, listener, grace_seconds, lambda: talking.append(pool.submit(talk_or_end))
        ))  # fmt: skip
    signal.signal(signal.SIGTERM, before)
    return status, talking[0].result()


def test_a_failed_step_is_got_over_and_sigterm_lets_answers_end_and_nobody_in(serve):
    server = serve("once", "--stall-seconds", "20", "--grace-seconds", "60",
                   "--log-format", "json")  # fmt: skip
    assert server.ask(LONG_PROMPT).status_code == 500
    wait_for(lambda: server.client.get("/ready").status_code == 200)
    assert server.ask(LONG_PROMPT).status_code == 200
    wait_for(lambda: server.num_admitted() == 0)  # A request is counted until its answer is away.
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.ask, **long_answer())
        wait_for(lambda: server.num_admitted() == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.client.get("/ready").status_code == 503)
        late = server.ask()
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "shutting_down"
        assert "retry-after" in late.headers
        assert server.client.get("/health").status_code == 200
    assert answer.result().text.endswith("data: [DONE]\n\n")
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


def test_the_grace_period_ends_what_does_not_end(model):
    def talk(server):
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.ask, **long_answer())
            wait_for(lambda: server.parts.admission.is_answering)
            tell_to_end()
            return answer.result().text

    status, text = serve_here(model, 0.1, talk)
    assert "shut down before this answer ended" in text
    assert status == 0


def test_a_second_signal_waits_for_nobody(model):
    def talk(server):
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.ask, **long_answer())
            wait_for(lambda: server.parts.admission.is_answering)
            tell_to_end()
            wait_for(lambda: server.parts.admission.why_closed)
            tell_to_end()
            return answer.exception()

    status, error = serve_here(model, 600, talk)
    assert status == 0
    assert isinstance(error, httpx.RemoteProtocolError)


@pytest.mark.parametrize("how", ["stick", "break", "die"])
def test_a_failed_engine_ends_the_process(serve, how):
    """Running requests hear of it, and the exit status is 1: nothing hangs."""
    server = serve(how, "--stall-seconds", "1")

    async def ask_both():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return await asyncio.gather(*(
                client.post("/v1/chat/completions", json=asked(LONG_PROMPT, stream=stream))
                for stream in (False, True)
            ))  # fmt: skip

    whole, streamed = asyncio.run(ask_both())
    assert whole.status_code in (500, 503)
    assert streamed.status_code in (200, 500, 503)
    assert '"error"' in whole.text
    assert '"error"' in streamed.text
    status, err = server.end()
    assert status == 1
    assert "engine failed" in err
