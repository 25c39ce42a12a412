"""Holding under load and abuse: everything wrong gets its 4xx at once, and harms nobody else."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
from running import IMAGES, NAME, connect, long_answer, picture, post, read_answer, user, wait_for

from minigpt4_runtime.server import app, listen
from minigpt4_runtime.server.failures import Failure

BODY = json.dumps({"model": NAME, "messages": [user("hi")], "max_tokens": 4}).encode()


def stream_body(**more):
    asked = {"model": NAME, "messages": [user("hi")]} | long_answer(**more)
    return json.dumps(asked).encode()


@contextlib.contextmanager
def streaming(server, **more):
    """A long answer while it grows; gives the pieces that are still to come."""
    headers = {"Content-Type": "application/json"}
    with server.client() as client, client.stream(
        "POST", "/v1/chat/completions", content=stream_body(**more), headers=headers
    ) as answer:  # fmt: skip
        pieces = answer.iter_raw()  # Kept: an iterator that is dropped closes the connection.
        next(pieces)
        yield pieces


def assert_well(server):
    """It still answers, and holds nothing of what came before."""
    server.wait_until_idle()
    assert server.ask().status_code == 200


# --- bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[" * 1_000_000, b'{"a":' * 200_000, b"\x00" * 100, b"\xff\xfe{}",
     b'{"model": "\\ud800", "messages": []}', BODY[:-1], BODY + b"}"],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_malformed_bodies(server, body):
    with server.client() as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(server, kind):
    """What a web page may send to another site without asking is not taken."""
    with server.client() as client:
        answer = client.post("/v1/chat/completions", content=BODY, headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_a_large_body_is_refused_by_its_length_before_it_is_sent(start):
    server = start(max_body_bytes=1000)
    with connect(server) as connection:
        connection.sendall(post(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999"))
        assert b" 413 " in connection.recv(4096)
    assert_well(server)


def test_a_large_body_without_a_length_is_refused_while_it_comes(start):
    server = start(max_body_bytes=1000)

    def parts():
        for _ in range(100):
            yield b" " * 100

    with server.client() as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=parts(), headers=headers)
    assert answer.status_code == 413
    assert "1,000 bytes" in answer.json()["error"]["message"]
    assert_well(server)


def test_a_slow_body_is_given_up(start):
    server = start(body_seconds=0.3)
    with connect(server) as connection:
        connection.sendall(post(BODY)[:-5])
        assert b" 408 " in connection.recv(4096)
    assert_well(server)


def test_slow_headers_are_given_up(start, monkeypatch):
    monkeypatch.setattr("minigpt4_runtime.server.connection._HEADER_SECONDS", 0.3)
    server = start()
    with connect(server) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        assert connection.recv(4096) == b""
    assert_well(server)


@pytest.mark.parametrize(
    "first",
    [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHo",
     b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"],
    ids=["headers of the next request", "a body that nobody reads"],
)  # fmt: skip
def test_what_follows_an_answer_slowly_is_given_up(start, monkeypatch, first):
    monkeypatch.setattr("minigpt4_runtime.server.connection._HEADER_SECONDS", 0.3)
    monkeypatch.setattr("minigpt4_runtime.server.connection.KEEP_ALIVE_SECONDS", 0.2)
    server = start()
    with connect(server) as connection:
        connection.sendall(first)
        assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() < deadline, "it is still open"
    assert_well(server)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"GET /" + b"a" * 100_000, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"],
    ids=lambda sent: repr(sent[:16]),
)  # fmt: skip
def test_what_is_not_http(server, sent):
    with connect(server) as connection:
        # A server that has read enough may have ended the connection by then.
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        status, _, told = read_answer(connection)
        assert status in (400, 404)
        assert told["error"]["type"] == "invalid_request_error"
    assert_well(server)


# --- what is asked ------------------------------------------------------------------------------


def test_bad_pictures(server, tmp_path):
    import base64

    png = (IMAGES / "three.png").read_bytes()
    huge = png[:16] + (60000).to_bytes(4, "big") * 2 + png[24:]
    for content in (b"", b"no picture", png[:200], png[:-40] + b"x" * 40, b"<svg/>", huge):
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        answer = server.ask(messages=[user([picture(url)])])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_image"
    for url in ("data:", "data:,x", "data:image/png;base64,%%%", "data:image/png;base64"):
        assert server.ask(messages=[user([picture(url)])]).status_code == 400
    assert_well(server)


def test_pixels_are_limited(server):
    import base64
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (1001, 1000)).save(content, "PNG")
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    answer = server.ask(messages=[user([picture(url)])])
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "the limit is 1,000,000" in message
    assert "ImageLimits" not in message, "a client of the server has no such thing"


@pytest.mark.parametrize(
    "part",
    [picture("data:image/png;base64," + "A" * 100), picture("data:image/png," + "A" * 100),
     picture("data:image/png;base64," + "%" * 100), {"type": "data:image/png;base64," + "A" * 100},
     {"type": "A" * 100_000}, {"A" * 100_000: 1}],
    ids=lambda part: str(part)[:60],
)  # fmt: skip
def test_errors_do_not_repeat_what_was_sent_at_length(server, part):
    answer = server.ask(messages=[user([part])])
    assert answer.status_code == 400
    assert "AAAAAAAAAAAAAAAA" not in answer.text or len(answer.text) < 1000
    assert "data:image/png;base64,A" not in answer.text
    assert "%%%%" not in answer.text


def test_counts_are_limited(server):
    answer = server.ask(messages=[user([picture()] * 9)])
    assert answer.json()["error"]["code"] == "too_many_images"
    assert server.ask(n=9).json()["error"]["param"] == "n"
    assert server.ask(max_tokens=4097).json()["error"]["param"] == "max_tokens"
    assert server.ask(num_beams=10_000).json()["error"]["param"] == "num_beams"


def test_long_prompts_are_refused_with_both_numbers(server, model):
    most = model.config.language.max_position_embeddings
    # What cannot fit is not even tokenised: there its characters are told.
    for text, unit in (("word " * most, "tokens"), ("x" * 5_000_000, "5,000,000 characters")):
        answer = server.ask(messages=[user(text)])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        message = answer.json()["error"]["message"]
        assert unit in message
        assert str(most) in message.replace(",", "")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "hi"}],
        [{"role": "system", "content": [picture()]}, user("hi")],
    ],
)
def test_dialogues_that_make_no_sense(server, messages):
    answer = server.ask(messages=messages)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/health", 405),
     ("GET", "/health/", 404), ("POST", "/v1/models/", 405), ("GET", "/%00", 404),
     ("GET", "/../../etc/passwd", 404)],
)  # fmt: skip
def test_other_routes(server, method, path, status):
    with server.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "advice"),
    [("/", "serve --ui"), ("/chat", "end in /v1"), ("/v1/chat", "/openapi.json"),
     ("/v1/v1/models", "/v1 twice")],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_answered_with_advice(server, method, path, advice):
    with server.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == 404
    assert advice in answer.json()["error"]["message"]


def test_a_web_socket_is_closed():
    """Our own server opens none, but others may run the application."""
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(app._Refusing(None)({"type": "websocket", "path": "/"}, None, send))
    assert sent == ["websocket.close"]


# --- many, and those who leave ------------------------------------------------------------------


def test_a_full_server_says_so_at_once(start):
    server = start(max_requests=1)
    # Nobody waits for its body either.
    with streaming(server), connect(server) as connection:
        connection.sendall(post(BODY)[:-5])
        status, headers, told = read_answer(connection)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert told["error"]["code"] == "queue_full"
    assert_well(server)


def test_choices_count_as_so_many(start):
    server = start(max_requests=3)
    refused = server.ask(n=4)  # There will never be room for it.
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert server.ask(n=3).status_code == 200
    server.wait_until_idle()
    with streaming(server, n=2):
        refused = server.ask(n=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert server.ask(n=1).status_code == 200
    assert_well(server)


def test_the_deadline_of_a_whole_answer(start):
    server = start(request_seconds=0.05)
    answer = server.ask(**long_answer(stream=False))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    server.wait_until_idle()


def test_the_deadline_of_a_stream_is_an_event(start):
    server = start(request_seconds=0.3)
    text = server.ask(**long_answer(n=8)).text
    *_, last = text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert "[DONE]" not in text
    server.wait_until_idle()


def steps_until_nothing_runs(model):
    at_cancel = model.stats().num_steps
    wait_for(lambda: not (model.stats().num_running or model.stats().num_waiting))
    return model.stats().num_steps - at_cancel


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_goes_away_is_cancelled(server, model, is_stream):
    server.wait_until_idle()
    with connect(server) as connection:
        connection.sendall(post(stream_body(stream=is_stream)))
        wait_for(lambda: model.stats().num_running == 1)
    # The whole answer takes 900 steps; what is left is the way from the socket to the engine.
    assert steps_until_nothing_runs(model) < 450
    server.wait_until_idle()


def test_cancelling_takes_one_step_from_where_the_server_knows(server, model):
    """From the server's word on: the engine drops it before its next step."""
    server.wait_until_idle()
    with streaming(server) as pieces:
        (slot,) = server.parts.admission._slots
        slot.abort(Failure(503, "Enough."))
        *_, last = pieces
        assert b"Enough." in last
        # The event goes out after the ticket was cancelled.
        assert steps_until_nothing_runs(model) <= 1


def test_many_who_leave_at_once_leave_nothing(server, model):
    def leave_early(delay):
        with connect(server) as connection:
            connection.sendall(post(stream_body()))
            time.sleep(delay)

    threads = [threading.Thread(target=leave_early, args=(i / 200,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: not (model.stats().num_running or model.stats().num_waiting))
    stats = model.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert_well(server)


def test_a_client_that_reads_nothing_slows_nobody_and_is_given_up(start, monkeypatch):
    bind = listen.bind

    def bind_with_little_room(host, port):
        listener = bind(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(listen, "bind", bind_with_little_room)
    monkeypatch.setattr("minigpt4_runtime.server.chat._PATIENCE_SECONDS", 0.1)
    server = start(request_seconds=2)
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post(stream_body(n=8, logprobs=True, top_logprobs=20)))
        wait_for(lambda: server.parts.admission.is_answering)
        assert server.ask(max_tokens=1).status_code == 200
        wait_for(lambda: b'outcome="cancelled"' in server.parts.metrics.as_text())
    assert_well(server)


def test_many_at_once_are_all_answered(server):
    async def ask_all():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            asked = {"model": NAME, "messages": [user([picture(), {"type": "text", "text": "?"}])],
                     "max_tokens": 8}  # fmt: skip
            return await asyncio.gather(
                *(client.post("/v1/chat/completions", json=asked) for _ in range(64))
            )

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
