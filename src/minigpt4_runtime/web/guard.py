"""What stands around the page: who may call it and where, how much may be sent, what is told.

Owns   the paths, the origins, the sizes, the headers and the failures that Gradio leaves open.
Takes  an ASGI application; is one itself.
Never  looks at what is asked, nor lets Gradio write it down.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What the page asks for, app_id when a server is back that was gone. Gradio answers more:
# histories, monitoring, calls past the queue, and the files of other machines.
_PATHS = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/(assets|static|svelte)/.+"
    r"|/gradio_api/(queue/join|queue/data|run/predict|cancel|reset|upload|upload_progress"
    r"|app_id|heartbeat/[^/]+|file=(?!https?:).+)"
)
# A question, settings and the names of files; pictures come as uploads.
_MAX_EVENT_BYTES = 2**20
_ROOM_AROUND_A_FILE = 2**16
# An answer may hold the address of a picture: it must not be asked for.
_POLICY = "img-src 'self' data: blob:; media-src 'self' data: blob:"

# Told of an error that nobody expected.
OnFailure = Callable[[BaseException], None]


class _TooLarge(Exception):
    """The body has more bytes than may be sent."""


class PageGuard:
    """Refuses the scripts of other sites, what no page asks for, and bodies that are too large.

    Where Gradio would answer 500 the request is refused too, and `on_failure` told of the error.
    """

    def __init__(self, app: ASGIApp, *, max_picture_bytes: int, on_failure: OnFailure) -> None:
        self._app = app
        self._max_upload_bytes = max_picture_bytes + _ROOM_AROUND_A_FILE
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].endswith("/upload")
        most = self._max_upload_bytes if is_upload else _MAX_EVENT_BYTES
        exchange = _Exchange(receive, send, most)
        refusal = _refuse(scope, most) or await self._pass_on(scope, exchange)
        if refusal:
            await refusal(scope, receive, send)

    async def _pass_on(self, scope: Scope, exchange: _Exchange) -> Response | None:
        """Let Gradio answer; gives what to say where it did not."""
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except (ClientDisconnect, _TooLarge):
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends here.
            self._on_failure(error)
        if exchange.has_answered:
            return None
        if exchange.is_too_large:
            return _too_large(exchange.most)
        return JSONResponse({"error": "This could not be done. The log says where it failed."}, 422)


class _Exchange:
    """One request's bytes, counted while they come, and its answer, if it is one to pass on."""

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive = receive
        self._send = send
        self._num_bytes = 0
        self.most = most
        self.has_answered = False

    @property
    def is_too_large(self) -> bool:
        """Whether more bytes came than may be sent."""
        return self._num_bytes > self.most

    async def receive(self) -> Message:
        """Pass on what comes, as long as it is not too much."""
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self.is_too_large:
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        """Pass the answer on, with nothing in it that opens the page to other sites."""
        if message["type"] == "http.response.start":
            # Whatever the application made of half a body or of its own mistake.
            self.has_answered = not self.is_too_large and message["status"] != 500
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            headers["Content-Security-Policy"] = _POLICY
        if self.has_answered:
            await self._send(message)


class PlacesOnly:
    """Stands where Gradio's modules have `traceback`: what they would print quotes the request."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure

    def print_exc(self, *_: Any) -> None:
        """Tell of the error that is being handled."""
        error = sys.exception()
        if error:
            self._on_failure(error)


def _refuse(scope: Scope, most: int) -> Response | None:
    """What to say to a request that is none of the page's, as far as its head shows."""
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
    """Whether a page of this very host asks, or no page at all."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
