"""The serving process: it listens, drains on a signal, and gives an exit status.

Owns   the socket, the signals, and the order in which things end.
Takes  an application; gives an exit status: 0 after a drain, 1 when the engine has failed.
Never  waits without an end: a drain has a grace period, and a second signal stops it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.server.connection import KEEP_ALIVE_SECONDS, Connection
from minigpt4_runtime.server.logs import log
from minigpt4_runtime.server.settings import ConnectionLimits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from minigpt4_runtime.server.app import Parts

_CLOSING_SECONDS = 2
_FAILED_SECONDS = 15
_STUCK_MS = 60_000
_MALLOPT_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h.


def keep_memory_together() -> None:
    """Let few heaps serve all threads; call it before there are any.

    glibc gives each thread its own heap and keeps freed memory there, so that memory creeps.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MALLOPT_ARENA_MAX, 2)


def keep_what_is_loaded() -> None:
    """Keep existing objects out of garbage collections; call it when all is loaded.

    A full collection would visit every object of torch, and stop all threads meanwhile.
    """
    gc.collect()
    gc.freeze()


def bind(host: str, port: int) -> socket.socket:
    """Take an address; port 0 takes a free one.

    Raises:
        ConfigError: it is not this machine's, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: tokens would come late, in bursts.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that reads nothing is disconnected, which cancels its request.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MS)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host} port {port} ({error}). Give another --port or --host."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_told(app: FastAPI, listener: socket.socket, on_start: Callable[[], object]) -> None:
    """Serve an application without answers to wait for, until a signal."""
    server = HttpServer(app, on_start)
    with _signals_to(server.handle_exit):
        asyncio.run(server.serve(sockets=[listener]))


@contextlib.contextmanager
def _signals_to(tell: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {each: signal.signal(each, tell) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


async def serve(
    app: FastAPI, listener: socket.socket, grace_seconds: float, on_start: Callable[[], object]
) -> int:
    """Serve until a signal or a failure, and give the exit status."""
    parts: Parts = app.state.parts
    server = HttpServer(app, on_start, parts.config.connections)
    loop, is_told = asyncio.get_running_loop(), asyncio.Event()
    parts.on_failure = is_told.set

    def tell(*_: object) -> None:
        if is_told.is_set():
            server.should_exit = server.force_exit = True
        loop.call_soon_threadsafe(is_told.set)

    async def end_when_told() -> None:
        await is_told.wait()
        await _end(parts, grace_seconds)
        server.should_exit = True

    ending = asyncio.create_task(end_when_told())
    with _signals_to(tell):
        await server.serve(sockets=[listener])
    ending.cancel()
    return 1 if parts.watch.has_failed else 0


async def _end(parts: Parts, grace_seconds: float) -> None:
    """Let running answers end within the grace period, and abort the rest."""
    if not parts.watch.has_failed:
        log("draining", seconds=grace_seconds)
        if not await parts.admission.drain(grace_seconds):
            log("grace period over", unfinished=parts.admission.num_taken)
            parts.admission.abort_all()
    else:
        # Nothing here may wait long for the failed engine.
        last_resort = threading.Timer(_FAILED_SECONDS, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
    # Aborted requests have a moment to tell their clients.
    await parts.admission.drain(_CLOSING_SECONDS)


class HttpServer(uvicorn.Server):
    """uvicorn as it is set up here. `on_start` is called when it listens."""

    def __init__(
        self,
        app: FastAPI,
        on_start: Callable[[], object] = lambda: None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._on_start = on_start
        limits = limits or ConnectionLimits()
        connection: Any = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                app, http=connection, ws="none", lifespan="on", log_config=None, access_log=False,
                server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                forwarded_allow_ips=[str(network) for network in limits.networks],
            )
        )  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if not self.started:
            return
        try:
            self._on_start()
        except OSError:
            # Without a shutdown the application would log a traceback.
            await self.shutdown(sockets)
            raise

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller: uvicorn would stop listening at once."""
        yield
