"""A request's body: read within limits, and checked before anything parses it.

Owns   the limits of size, time and complexity, and the large images that are taken out of a body.
Takes  a request; gives a Body, or a Failure.
Never  parses: it finds where strings end, and counts the bytes inside and between them.
"""

from __future__ import annotations

import asyncio
import binascii
import secrets
import string
from collections import Counter

from starlette.requests import Request

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.server.failures import Failure, queue_full

# The JSON parser and the decoder of base64 hold Python's global lock in any thread. Each call must
# end within some 50 ms.
MAX_SIGNS = 10_000
MAX_DEPTH = 64
MAX_BYTES_OUTSIDE_STRINGS = 2**20
MAX_TEXT_BYTES = 8 * 2**20  # In strings that hold no large image.
MAX_BACKSLASHES = 2**19
# From this size on an image is taken out.
LARGE_IMAGE_BYTES = 2**16

_SIGNS = "brackets, commas, colons and strings"
_NO_SIGNS = bytes(byte for byte in range(256) if byte not in b"{}[],:")
_BASE64 = (string.ascii_letters + string.digits + "+/\\").encode()
_MOST_HEAD_BYTES = 200  # Of a data URL: its type.
_PIECE = 2**20


class Body:
    """A body: `content` is JSON in which names stand for large images."""

    def __init__(self, whole: bytearray) -> None:
        """Check a body, and take large images out.

        Raises:
            Failure: parsing it would take too long.
        """
        self._whole = whole
        self._images: dict[str, tuple[int, int]] = {}
        self._secret = secrets.token_hex(8)  # No client can write such a name.
        self.content = bytearray()
        self._take_apart()

    def image(self, url: str) -> bytes | None:
        """The image of this name; None for a URL. Slow for a large image.

        Raises:
            ImageError: it is not base64.
        """
        if url not in self._images:
            return None
        at, end = self._images[url]
        image, rest = bytearray(), b""
        try:
            while at < end:
                rest += self._whole[at : min(at + _PIECE, end)].translate(None, b"\\=")
                at += _PIECE
                whole = len(rest) // 4 * 4
                image += binascii.a2b_base64(rest[:whole])
                rest = rest[whole:]
            image += binascii.a2b_base64(rest + b"=" * (-len(rest) % 4))
        except ValueError as error:
            told = f"The picture given as a data URL is not base64 ({error}). Encode it again."
            raise ImageError(told) from None
        return bytes(image)

    def forget(self) -> None:
        """Free the memory: the body has been read."""
        self._whole.clear()
        self.content.clear()

    def _take_apart(self) -> None:
        body, counts, at = self._whole, _Counts(), 0
        for piece in range(0, len(body), _PIECE):
            counts.add("backslashes", body.count(b"\\", piece, piece + _PIECE), MAX_BACKSLASHES)
        while at < len(body):
            opening = body.find(b'"', at)
            end = opening if opening >= 0 else len(body)
            outside = body[at : min(end, at + MAX_BYTES_OUTSIDE_STRINGS + 1)]
            counts.add_outside(outside)
            self.content += outside
            if opening < 0:
                return
            at = _end_of_string(body, opening + 1)
            image_at = _find_image(body, opening + 1, at - 1)
            if image_at < 0:
                counts.add("bytes of text", at - 1 - opening, MAX_TEXT_BYTES)
                self.content += body[opening:at]
            else:
                name = f"data:held;{self._secret},{len(self._images)}"
                self._images[name] = (image_at, at - 1)
                self.content += f'"{name}"'.encode()


def _end_of_string(body: bytearray, start: int) -> int:
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


def _find_image(body: bytearray, start: int, end: int) -> int:
    """Where the base64 begins in a string that holds one large image and nothing else; else -1."""
    head = body[start : start + _MOST_HEAD_BYTES].partition(b",")[0]
    is_large = end - start > LARGE_IMAGE_BYTES and end <= len(body)
    if not is_large or head[:5].lower() != b"data:" or head[-7:].lower() != b";base64":
        return -1
    start += len(head) + 1
    # Padding stands only at the end, and a backslash only before a slash, where it means nothing.
    padding = body.find(b"=", start, end)
    if padding >= 0 and body[padding:end].strip(b"="):
        return -1
    at, last = start, padding if padding >= 0 else end
    while at < last:
        piece = body[at : min(at + _PIECE, last)].rstrip(b"\\")
        is_plain = not piece.translate(None, _BASE64)
        if not piece or not is_plain or piece.count(b"\\") != piece.count(b"\\/"):
            return -1
        at += len(piece)
    return start


class BodyReader:
    """Reads bodies of up to `max_bytes`, of which `max_arriving_bytes` may be on their way."""

    def __init__(self, *, max_bytes: int, max_arriving_bytes: int, seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_arriving_bytes = max_arriving_bytes
        self._seconds = seconds
        self._num_arriving = 0

    async def read(self, request: Request) -> Body:
        """The body, counted while it arrives: a promised length is not trusted.

        Raises:
            Failure: it is too large, too slow, or would take too long to parse.
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
            raise Failure(408, message, code="body_too_slow") from None
        finally:
            self._num_arriving -= len(body)
        return await asyncio.to_thread(Body, body)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()
        if self._num_arriving > self._max_arriving_bytes:
            raise queue_full("Too much is being sent to this server at once.")

    def _too_large(self) -> Failure:
        message = f"The body has more than {self._max_bytes:,} bytes. Send less."
        return Failure(413, message, code="body_too_large")


class _Counts:
    """The counts of one body so far."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._depth = 0

    def add(self, what: str, number: int, most: int) -> None:
        """Count `number` more of something, and refuse more than `most`."""
        self._counts[what] += number
        if self._counts[what] > most:
            message = f"The body has more than {most:,} {what}. Send less."
            raise Failure(400, message, code="body_too_complex")

    def add_outside(self, content: bytearray) -> None:
        """Count the signs between two strings, and their depth."""
        self.add("bytes outside of strings", len(content), MAX_BYTES_OUTSIDE_STRINGS)
        signs = content.translate(None, _NO_SIGNS)
        self.add(_SIGNS, len(signs) + 1, MAX_SIGNS)
        for sign in signs:
            self._depth += (sign in b"{[") - (sign in b"}]")
            if self._depth > MAX_DEPTH:
                message = f"The body has more than {MAX_DEPTH} brackets within each other."
                raise Failure(400, message, code="body_too_complex")
