"""The guard around the page, as an ASGI application around another.

Owns   the limits that Gradio lacks: of paths, origins, sizes and times; the headers, and failures.
Takes  an ASGI application, and requests to it.
Never  reads questions, nor lets Gradio log them.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_runtime.web.upload_room import UploadRoom, is_full_disk

# The page's own paths; it asks for app_id when the server is back after an absence. Gradio has
# more: histories, monitoring, calls past the queue, and the files of other machines.
_PATHS = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/(assets|static|svelte)/.+"
    r"|/gradio_api/(queue/join|queue/data|run/predict|cancel|reset|upload|upload_progress"
    r"|app_id|heartbeat/[^/]+|file=(?!https?:).+)"
)
# A question, settings and the names of files; pictures come as uploads.
_MAX_EVENT_BYTES = 2**20
_ROOM_AROUND_A_FILE = 2**16
# A browser sends all pictures chosen at once in one body; Gradio limits the size of each.
_IMAGES_AT_ONCE = 8
# The time for a body; a picture may come over a phone's slow connection.
_EVENT_SECONDS = 30.0
_UPLOAD_SECONDS = 120.0
_FULL_DISK = (
    "The server's disk is full, and this could not be kept. Tell its operator, or try later."
)
# An answer may hold the address of a picture, which browsers must not load.
_POLICY = "img-src 'self' data: blob:; media-src 'self' data: blob:"

# It is called with each unexpected error.
OnFailure = Callable[[BaseException], None]


class _GivenUp(Exception):
    """The rest of a body will not be read."""


class PageGuard:
    """Refuses other sites' scripts, unknown paths, and bodies that are too large or too slow.

    A request that Gradio would answer with 500 is refused too, and `on_failure` gets the error.
    """

    def __init__(
        self, app: ASGIApp, *, max_image_bytes: int, room: UploadRoom, on_failure: OnFailure
    ) -> None:
        self._app = app
        self._max_upload_bytes = _IMAGES_AT_ONCE * (max_image_bytes + _ROOM_AROUND_A_FILE)
        self._room = room
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].endswith("/upload")
        most = self._max_upload_bytes if is_upload else _MAX_EVENT_BYTES
        refusal = _refuse(scope, most)
        if not refusal:
            exchange = _Exchange(receive, send, most, self._room if is_upload else None)
            refusal = await self._pass_on(scope, exchange)
            exchange.end()
        if refusal:
            await refusal(scope, receive, send)

    async def _pass_on(self, scope: Scope, exchange: _Exchange) -> Response | None:
        """Let Gradio answer; return the refusal to send if it did not."""
        told = {"error": "This could not be done. The log says where it failed."}
        failed: Response = JSONResponse(told, 422)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except (ClientDisconnect, _GivenUp):
            pass
        except Exception as error:  # noqa: BLE001 - no error passes this guard.
            self._on_failure(error)
            if is_full_disk(error):
                failed = PlainTextResponse(_FULL_DISK, 507)
        return None if exchange.has_answered else exchange.refusal or failed


class _Exchange:
    """One request's bytes, counted while they arrive, and its answer, unless that is a failure."""

    def __init__(self, receive: Receive, send: Send, most: int, room: UploadRoom | None) -> None:
        self._receive = receive
        self._send = send
        self._most = most
        self._room = room
        self._upload = room and room.begin()
        self._num_bytes = self._status = 0
        self._is_whole = False
        self._seconds = _UPLOAD_SECONDS if room else _EVENT_SECONDS
        self._deadline = asyncio.get_running_loop().time() + self._seconds
        self.refusal: Response | None = None
        self.has_answered = False

    async def receive(self) -> Message:
        """Pass on a message while the body is within its limits of size and time."""
        if self._is_whole:
            return await self._receive()
        if not self.refusal:
            try:
                async with asyncio.timeout_at(self._deadline):
                    message = await self._receive()
            except TimeoutError:
                told = f"The body did not arrive within {self._seconds:g} seconds."
                self.refusal = PlainTextResponse(told, 408, headers={"Connection": "close"})
            else:
                self._is_whole = not message.get("more_body")
                self._count(len(message.get("body", b"")))
        if self.refusal:
            raise _GivenUp
        return message

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._most:
            self.refusal = _too_large(self._most)
        elif self._room and self._upload and not self._room.add(self._upload, num_bytes):
            told = (
                f"The page keeps {self._room.max_bytes / 2**20:,.0f} MiB of pictures, each for "
                "about an hour, and has no room for this one. Try again later."
            )
            self.refusal = PlainTextResponse(told, 507)

    def end(self) -> None:
        """Do not count a failed upload any more."""
        if self._room and self._upload and self._status != 200:
            self._room.forget(self._upload)

    async def send(self, message: Message) -> None:
        """Pass the answer on, without headers that open the page to other sites."""
        if message["type"] == "http.response.start":
            # An answer to half a body, or to the application's own mistake, is not passed on.
            self.has_answered = not self.refusal and message["status"] != 500
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            headers["Content-Security-Policy"] = _POLICY
        if self.has_answered:
            await self._send(message)


class PlacesOnly:
    """Replaces `traceback` in Gradio's modules, whose tracebacks would quote the request."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure

    def print_exc(self, *_: Any) -> None:
        """Tell of the error that is being handled."""
        error = sys.exception()
        if error:
            self._on_failure(error)


def _refuse(scope: Scope, most: int) -> Response | None:
    """The refusal of a request by its head alone; None if it may pass."""
    headers = Headers(scope=scope)
    if not _is_own(headers):
        return PlainTextResponse("Other sites may not use this page.", 403)
    if not _PATHS.fullmatch(scope["path"].removeprefix(scope.get("root_path", ""))):
        return PlainTextResponse("There is nothing here. The chat page is at /.", 404)
    promised = headers.get("content-length", "0")
    return _too_large(most) if promised.isdigit() and int(promised) > most else None


def _too_large(most: int) -> Response:
    return PlainTextResponse(f"The body has more than {most:,} bytes.", 413)


def _is_own(headers: Headers) -> bool:
    """Whether the request comes from a page of this host, or from no page."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
