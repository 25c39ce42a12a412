"""One connection: how long it may be silent, when it makes room, and how it ends.

Owns   the cases that uvicorn's protocol leaves open: slow headers, too many connections, ambiguous
       HTTP, and clients that close their half.
Takes  bytes from a socket and ConnectionLimits.
Never  looks into a body.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4_runtime.server.failures import INVALID, Failure
from minigpt4_runtime.server.settings import ConnectionLimits

KEEP_ALIVE_SECONDS = 30
_HEADER_SECONDS = 20.0
# How long a client that is refused may take to read why.
_REFUSAL_SECONDS = 2.0
_PROBE_SECONDS = (0.1, 1.0)  # The first wait, and the longest.
_BOTH_LENGTHS = {b"content-length", b"transfer-encoding"}


class _StrictReader(h11.Connection):
    """Refuses a request with two lengths: a proxy may have believed the other (RFC 9112, 6.3)."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and {name for name, _ in event.headers} >= _BOTH_LENGTHS:
            raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        return event


class Connection(H11Protocol):
    """Limits the time for a request's headers, and the number of connections.

    At the limit, the connection that has waited longest for the rest of a request is closed, so
    that unfinished requests do not block others.
    """

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = _StrictReader(h11.SERVER)
        self.counts_as: str | None = None
        self.waits_since = self.loop.time()
        self._limits = limits
        self._answered: object = None
        self._is_refused = self._is_half_closed = False
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._close_if_silent)

    @property
    def is_asked(self) -> bool:
        """Whether a whole request has come that is not answered yet."""
        return self.cycle is not self._answered and not self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it."""
        super().connection_made(transport)
        self.counts_as = self._limits.client_of(self.client[0] if self.client else None)
        own = [each for each in self._others() if each.counts_as == self.counts_as]
        if self.counts_as and len(own) >= (self._limits.per_client or 0):
            self._refuse(429, f"There are {len(own)} connections of yours here already.")
        elif len(self._others()) >= self._limits.most and not self._make_room():
            self._refuse(503, f"There are {self._limits.most} connections here already.")

    def data_received(self, data: bytes) -> None:
        """Read, unless the connection was refused."""
        if not self._is_refused:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Stay open for a client that has asked and says no more: it may still read."""
        if self._is_refused or not self.is_asked:
            return False
        if not self._is_half_closed:
            self._is_half_closed = True
            self._probe(_PROBE_SECONDS[0])
        return True

    def on_response_complete(self) -> None:
        """Wait for the next request, if there can be one."""
        # The same time again for the next request, and for the rest of this one's body.
        self._answered = self.cycle
        self.waits_since = self.loop.time()
        super().on_response_complete()
        self._timer.cancel()
        wait = KEEP_ALIVE_SECONDS + _HEADER_SECONDS
        self._timer = self.loop.call_later(wait, self._close_if_silent)
        if self._is_half_closed and self.cycle is self._answered:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with an error in the usual form."""
        self._end_with(Failure(400, msg, INVALID))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _others(self) -> list[Connection]:
        return [each for each in self.connections if isinstance(each, Connection)
                and each is not self]  # fmt: skip

    def _make_room(self) -> bool:
        waiting = [each for each in self._others() if not each.is_asked]
        if waiting:
            min(waiting, key=lambda each: each.waits_since).transport.abort()
        return bool(waiting)

    def _refuse(self, status: int, message: str) -> None:
        # If it were closed at once, the client, still sending, would see only a reset.
        self.connections.discard(self)
        self._is_refused = True
        message += " Close some, or try again later."
        self._end_with(Failure(status, message, "rate_limit_error", code="too_many_connections"))
        self.transport.write_eof()
        self._timer.cancel()
        self._timer = self.loop.call_later(_REFUSAL_SECONDS, self.transport.abort)

    def _end_with(self, failure: Failure) -> None:
        body = json.dumps(failure.as_body()).encode()
        # With its length: if not all was read, the connection ends in a reset.
        headers = [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"), *[(b"retry-after", b"1")] * (failure.status != 400),
        ]  # fmt: skip
        reason = HTTPStatus(failure.status).phrase.encode()
        answer = h11.Response(status_code=failure.status, headers=headers, reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _probe(self, wait: float) -> None:
        """Write to a half-closed connection: if the client is gone, the second write fails."""
        if self.transport.is_closing() or not self.is_asked or self.cycle.response_started:
            return
        if self.scope["http_version"] == "1.1":
            event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(event) or b"")
        self.loop.call_later(wait, self._probe, min(2 * wait, _PROBE_SECONDS[1]))

    def _close_if_silent(self) -> None:
        if self.cycle is self._answered:
            self.transport.abort()
