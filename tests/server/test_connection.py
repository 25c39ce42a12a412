"""Connections: silent ones make room, one client has so many, and each ends as it should."""

import contextlib
import json
import socket

import pytest
from running import NAME, connect, long_answer, post, read_answer, user, wait_for

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.server.settings import ConnectionLimits

BODY = json.dumps({"model": NAME, "messages": [user("hi")], "max_tokens": 4}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def elsewhere(**limits):
    """Limits that hold for this machine too, as if it were another."""
    made = ConnectionLimits(**limits)
    vars(made)["networks"] = []
    return made


@contextlib.contextmanager
def unsent(server, number):
    """So many questions whose bodies are promised and never sent."""
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(connect(server)).sendall(post(BODY)[: -len(BODY)])
        wait_for(lambda: len(server.parts.admission._slots) == number)
        yield


# --- places and connections ---------------------------------------------------------------------


def test_bodies_that_are_never_sent_take_no_place(start):
    server = start(max_requests=2)
    with unsent(server, 20):
        assert server.parts.admission.num_taken == 0
        assert server.ask().status_code == 200


def test_a_place_is_taken_when_the_body_is_there(start, model):
    server = start(max_requests=1)
    with connect(server) as late:
        late.sendall(post(BODY)[:-1])
        wait_for(lambda: server.parts.admission._slots)
        body = json.dumps({"model": NAME, "messages": [user("hi")]} | long_answer()).encode()
        with connect(server) as first:
            first.sendall(post(body))
            wait_for(lambda: model.stats().num_running == 1)
            late.sendall(BODY[-1:])
            status, _, told = read_answer(late)
            assert (status, told["error"]["code"]) == (429, "queue_full")
    server.wait_until_idle()


def test_one_client_does_not_take_all_places(start):
    server = start(max_requests=8, connections=ConnectionLimits(per_client=2))

    def ask(address, n):
        asked = {"model": NAME, "messages": [user("hi")], "max_tokens": 1, "n": n}
        with server.client(headers={"X-Forwarded-For": address} if address else {}) as client:
            return client.post("/v1/chat/completions", json=asked)

    # Of the proxy on this machine all are told apart; who comes without one is not counted.
    for address in ("203.0.113.7", "2001:db8::1"):
        refused = ask(address, 3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "2 requests of one client" in refused.json()["error"]["message"]
        assert ask(address, 2).status_code == 200
    assert ask(None, 3).status_code == 200
    # A machine that is no proxy of ours says nothing about its clients.
    server.parts.config.connections.networks.clear()
    assert ask(None, 3).status_code == 429


def test_connections_of_one_client_are_limited(start):
    server = start(connections=elsewhere(per_client=2))
    with connect(server) as first, connect(server) as second:
        for each in (first, second):
            each.sendall(HEALTH)
            assert read_answer(each)[0] == 200
        with connect(server) as third:
            third.sendall(HEALTH)
            status, headers, told = read_answer(third)
            assert (status, told["error"]["code"]) == (429, "too_many_connections")
            assert headers["Retry-After"] == "1"
            assert third.recv(1) == b""
    wait_for(lambda: server.ask().status_code == 200)


def test_what_is_never_asked_makes_room(start):
    server = start(connections=ConnectionLimits(most=3))
    with unsent(server, 2), connect(server) as silent, connect(server) as asking:
        # The oldest goes first, and silent ones like all others.
        for each in (asking, silent):
            each.sendall(HEALTH)
            assert read_answer(each)[0] == 200
        for _ in range(5):
            assert server.ask().status_code == 200


def test_a_server_full_of_questions_says_so(start, model):
    server = start(connections=ConnectionLimits(most=1))
    body = json.dumps({"model": NAME, "messages": [user("hi")]} | long_answer()).encode()
    with connect(server) as first:
        first.sendall(post(body))
        wait_for(lambda: model.stats().num_running == 1)
        with connect(server) as second:
            second.sendall(HEALTH)
            status, _, told = read_answer(second)
            assert (status, told["error"]["code"]) == (503, "too_many_connections")
    server.wait_until_idle()
    assert server.ask().status_code == 200


def test_who_counts_as_one_client():
    limits = ConnectionLimits(proxies=("192.0.2.1", "198.51.100.0/24"))
    assert limits.client_of("203.0.113.7") == "203.0.113.7"
    same = {limits.client_of(f"2001:db8:0:1::{number}") for number in range(1, 9)}
    assert same == {"2001:db8:0:1::/64"}
    for none in ("127.0.0.1", "::1", "192.0.2.1", "198.51.100.9", None, "", "unknown"):
        assert limits.client_of(none) is None
    assert ConnectionLimits(per_client=None).client_of("203.0.113.7") is None


@pytest.mark.parametrize("wrong", [{"most": 0}, {"per_client": -1}, {"proxies": ("a.example",)}])
def test_limits_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        ConnectionLimits(**wrong)


# --- how a connection ends ----------------------------------------------------------------------


def test_two_lengths_end_the_connection(server):
    """Nothing behind such a request is taken for another one."""
    both = b"Content-Type: application/json\r\nTransfer-Encoding: chunked"
    head = post(b"").replace(b"Content-Type: application/json", both)
    with connect(server) as connection:
        connection.sendall(head + b"0\r\n\r\n" + HEALTH)
        status, headers, told = read_answer(connection)
        assert (status, headers["Connection"]) == (400, "close")
        assert told["error"]["type"] == "invalid_request_error"
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_half_closed_connection_gets_its_answer(server, version):
    with connect(server) as connection:
        connection.sendall(post(BODY).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        connection.shutdown(socket.SHUT_WR)
        status, _, told = read_answer(connection)
        assert status == 200
        assert told["choices"][0]["message"]
        assert connection.recv(1) == b"", "and then it ends"


def test_a_half_closed_connection_gets_its_stream(server):
    body = json.loads(BODY) | {"stream": True}
    with connect(server) as connection:
        connection.sendall(post(json.dumps(body).encode()) + HEALTH)
        connection.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"data: [DONE]" in told
    assert told.endswith(b'{"status":"alive","reason":null}'), "what was asked behind it too"


def test_a_connection_that_half_closes_within_its_stream_gets_the_rest(server):
    body = json.loads(BODY) | {"stream": True}
    with connect(server) as connection:
        connection.sendall(post(json.dumps(body).encode()))
        told = connection.recv(4096)
        connection.shutdown(socket.SHUT_WR)
        told += b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"data: [DONE]" in told


def test_who_half_closes_and_goes_is_noticed(server, model):
    server.wait_until_idle()
    body = json.dumps({"model": NAME, "messages": [user("hi")]} | long_answer(stream=False))
    with connect(server) as connection:
        connection.sendall(post(body.encode()))
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: model.stats().num_running == 1)
        steps = model.stats().num_steps
    wait_for(lambda: not model.stats().num_running)
    # The whole answer takes 900.
    assert model.stats().num_steps - steps < 450
    server.wait_until_idle()
