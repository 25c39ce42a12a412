"""What stands around the page: whose scripts may call it, and how much may be sent.

Owns   the origins, the sizes and the headers that Gradio leaves open.
Takes  an ASGI application; is one itself.
Never  looks at what is asked.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A question, settings and the names of files; pictures come as uploads.
_MAX_EVENT_BYTES = 2**20
_ROOM_AROUND_A_FILE = 2**16
# An answer may hold the address of a picture: it must not be asked for.
_POLICY = "img-src 'self' data: blob:; media-src 'self' data: blob:"


class _TooLarge(Exception):
    """The body has more bytes than may be sent."""


class PageGuard:
    """Refuses the scripts of other sites, and bodies that are too large."""

    def __init__(self, app: ASGIApp, *, max_picture_bytes: int) -> None:
        self._app = app
        self._max_upload_bytes = max_picture_bytes + _ROOM_AROUND_A_FILE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not _is_own(headers):
            refusal = PlainTextResponse("Other sites may not use this page.", 403)
            await refusal(scope, receive, send)
            return
        is_upload = scope["path"].endswith("/upload")
        most = self._max_upload_bytes if is_upload else _MAX_EVENT_BYTES
        too_large = PlainTextResponse(f"The body has more than {most:,} bytes.", 413)
        promised = headers.get("content-length", "0")
        if promised.isdigit() and int(promised) > most:
            await too_large(scope, receive, send)
            return
        exchange = _Exchange(receive, send, most)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except _TooLarge:
            if not exchange.has_answered:
                await too_large(scope, receive, send)


class _Exchange:
    """One request's bytes, counted while they come, and its answer's headers."""

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive = receive
        self._send = send
        self._left = most
        self.has_answered = False

    async def receive(self) -> Message:
        """Pass on what comes, as long as it is not too much."""
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        """Pass the answer on, with nothing in it that opens the page to other sites."""
        if message["type"] == "http.response.start":
            self.has_answered = True
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            headers["Content-Security-Policy"] = _POLICY
            if self._left < 0:  # Whatever the application made of it.
                message["status"] = 413
        await self._send(message)


def _is_own(headers: Headers) -> bool:
    """Whether a page of this very host asks, or no page at all."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
