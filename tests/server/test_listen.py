"""The socket that is listened on."""

import asyncio
import gc
import os
import signal
import socket

import pytest
from fastapi import FastAPI

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.server import listen


def test_what_is_written_leaves_at_once():
    """asyncio turns Nagle's algorithm off, but only on sockets that say they are TCP."""

    async def accept_one():
        accepted = asyncio.get_running_loop().create_future()

        def on_connection(_, writer):
            connection = writer.get_extra_info("socket")
            option = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            accepted.set_result(option)
            writer.close()

        listener = listen.bind("127.0.0.1", 0)
        async with await asyncio.start_server(on_connection, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = await accepted
            writer.close()
            await writer.wait_closed()
        return option

    assert asyncio.run(accept_one())


def test_a_port_that_is_taken_is_told():
    with listen.bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="Give another --port"):
            listen.bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 99999)])
def test_an_address_that_cannot_be_is_told(host, port):
    with pytest.raises(ConfigError, match="Cannot listen on"):
        listen.bind(host, port)


def test_urls():
    with listen.bind("127.0.0.1", 0) as listener:
        assert listen.url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_application_is_served_until_a_signal(number):
    before, started = signal.getsignal(number), []

    def on_start():
        started.append(True)
        os.kill(os.getpid(), number)

    listen.serve_until_told(FastAPI(), listen.bind("127.0.0.1", 0), on_start)
    assert started
    assert signal.getsignal(number) is before


def test_garbage_is_looked_for_among_what_comes_after_loading():
    before = gc.get_freeze_count()
    listen.keep_what_is_loaded()
    try:
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()
