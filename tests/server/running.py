"""A real server on a free port of this machine, in a thread; and what is asked of it."""

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from minigpt4_runtime.server import listen
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples" / "images"
NAME = "minigpt4-demo"


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    app: object

    @property
    def parts(self):
        return self.app.state.parts

    def client(self, **settings) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **settings)

    def openai(self, key="none", **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def ask(self, **body) -> httpx.Response:
        """Ask "hi", or as `body` says; a value of ... leaves a name out."""
        asked = {"model": NAME, "messages": [user("hi")], "max_tokens": 8} | body
        given = {name: value for name, value in asked.items() if value is not ...}
        with self.client() as client:
            return client.post("/v1/chat/completions", json=given)

    def wait_until_idle(self):
        wait_for(lambda: self.parts.admission.num_taken == 0)


def wait_for(is_true, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def user(content):
    return {"role": "user", "content": content}


def data_url(name="three.png"):
    return "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def picture(url=None):
    return {"type": "image_url", "image_url": {"url": url or data_url()}}


def long_answer(**more):
    """Settings for an answer that takes a while: this seed draws 900 tokens and no stop."""
    lots = {"max_tokens": 900, "min_tokens": 900, "temperature": 20.0, "seed": 94}
    return {**lots, "stream": True} | more


@contextlib.contextmanager
def connect(server):
    """A bare connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def post(body, headers="Content-Type: application/json"):
    """The bytes of a question."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_answer(connection):
    """Status, headers and content; head and body may come one after the other."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.length is not None, "without a length its end is the connection's"
    return answer.status, answer.headers, json.loads(answer.read())


@contextlib.contextmanager
def running(model, **settings):
    app = create_app(model, ServerConfig(**{"model_name": NAME} | settings))
    listener = listen.bind("127.0.0.1", 0)
    server = listen.HttpServer(app, limits=app.state.parts.config.connections)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    wait_for(lambda: server.started and app.state.parts.watch.trouble is None)
    try:
        yield Running(listen.url_of(listener), app)
    finally:
        server.should_exit = True
        thread.join()
