"""A request's body: read within limits, and looked over before anything parses it.

Owns   how large, how slow and how intricate a body may be.
Takes  a request; gives its bytes, or a Refusal.
Never  parses: it finds where strings end, and counts what stands between them and in them.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter

from starlette.requests import Request

from minigpt4_runtime.server.failures import Refusal

# A parser holds Python's one lock until it has finished, in whatever thread it runs: what it is
# given must be done in some 50 ms. Plain text is fast, these things are slow.
MAX_SIGNS = 20_000  # Brackets, commas, colons and strings.
MAX_DEPTH = 64
MAX_BYTES_OUTSIDE_STRINGS = 2**20
MAX_TEXT_BYTES = 8 * 2**20  # In strings that are no picture.
MAX_BACKSLASHES = 2**19

_NO_SIGNS = bytes(byte for byte in range(256) if byte not in b"{}[],:")
_IS_DATA_URL = re.compile(rb"data:", re.IGNORECASE)
_PIECE = 2**20
_SIGNS = "brackets, commas, colons and strings"


class BodyReader:
    """Reads bodies of up to `max_bytes`, of which `max_arriving_bytes` may be on their way."""

    def __init__(self, *, max_bytes: int, max_arriving_bytes: int, seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_arriving_bytes = max_arriving_bytes
        self._seconds = seconds
        self._num_arriving = 0

    async def read(self, request: Request) -> bytearray:
        """The body, counted while it comes: a length that is promised is not believed.

        Raises:
            Refusal: it is too large, too slow, or would keep a parser too long.
        """
        body = bytearray()
        promised = request.headers.get("content-length", "0")
        if promised.isdigit() and int(promised) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                async for part in request.stream():
                    body += part
                    self._num_arriving += len(part)
                    self._check(len(body))
        except TimeoutError:
            message = f"The body did not arrive within {self._seconds:g} seconds."
            raise Refusal(408, message, code="body_too_slow") from None
        finally:
            self._num_arriving -= len(body)
        await asyncio.to_thread(check_shape, body)
        return body

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()
        if self._num_arriving > self._max_arriving_bytes:
            raise Refusal(
                429, "Too much is being sent to this server at once. Try again later.",
                kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip

    def _too_large(self) -> Refusal:
        message = f"The body has more than {self._max_bytes:,} bytes. Send less."
        return Refusal(413, message, code="body_too_large")


def check_shape(body: bytes | bytearray) -> None:
    """Refuse what a parser would take long over. What is no JSON is left for it to say.

    Raises:
        Refusal: there are too many signs or backslashes, or too much text.
    """
    shape, at = _Shape(), 0
    for piece in range(0, len(body), _PIECE):
        shape.count("backslashes", body.count(b"\\", piece, piece + _PIECE), MAX_BACKSLASHES)
    while at < len(body):
        opening = body.find(b'"', at)
        end = opening if opening >= 0 else len(body)
        shape.add_outside(body[at : min(end, at + MAX_BYTES_OUTSIDE_STRINGS + 1)])
        if opening < 0:
            return
        at = _end_of_string(body, opening + 1)
        shape.add_string(body, opening + 1, at - 1)


def _end_of_string(body: bytes | bytearray, start: int) -> int:
    """Behind the quote that ends the string which begins at `start`."""
    at = start
    while (quote := body.find(b'"', at)) >= 0:
        before = quote
        while before > start and body[before - 1 : before] == b"\\":
            before -= 1
        at = quote + 1
        if (quote - before) % 2 == 0:
            return at
    return len(body) + 1


class _Shape:
    """What was counted in a body so far."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._depth = 0

    def count(self, what: str, number: int, most: int) -> None:
        """Add a number of something of which there may be so many."""
        self._counts[what] += number
        if self._counts[what] > most:
            message = f"The body has more than {most:,} {what}. Send less."
            raise Refusal(400, message, code="body_too_complex")

    def add_outside(self, content: bytes | bytearray) -> None:
        """What stands between two strings."""
        self.count("bytes outside of strings", len(content), MAX_BYTES_OUTSIDE_STRINGS)
        signs = content.translate(None, _NO_SIGNS)
        self.count(_SIGNS, len(signs) + 1, MAX_SIGNS)
        for sign in signs:
            self._depth += (sign in b"{[") - (sign in b"}]")
            if self._depth > MAX_DEPTH:
                message = f"The body has more than {MAX_DEPTH} brackets within each other."
                raise Refusal(400, message, code="body_too_complex")

    def add_string(self, body: bytes | bytearray, start: int, end: int) -> None:
        """A string: only a picture may be long, and it is written in ASCII."""
        pieces = (body[at : min(at + _PIECE, end)] for at in range(start, end, _PIECE))
        if not (_IS_DATA_URL.match(body, start) and all(piece.isascii() for piece in pieces)):
            self.count("bytes of text", end - start, MAX_TEXT_BYTES)
