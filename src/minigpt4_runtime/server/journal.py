"""The record of each request: its id, its line in the log and its count.

Owns   request ids and the outcome of requests.
Takes  every request and answer on its way through; gives the id back as a header.
Never  looks into a body.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_runtime.server.failures import error_response
from minigpt4_runtime.server.logs import log, log_failure

_USABLE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OUTCOMES = {401: "unauthorized", 429: "queue_full", 503: "unavailable", 504: "timeout"}


class Journal:
    """The outermost layer of the application; it also catches every error."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str], None]) -> None:
        """`count` is told the route and the outcome of every request."""
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record its outcome."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = _request_id(scope), time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []), (b"x-request-id", request_id.encode()),
                ]  # fmt: skip
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            state["outcome"] = "cancelled"
        except Exception as error:  # noqa: BLE001 - the last place that can tell the client.
            log_failure(error, request_id=request_id)
            state["outcome"] = "failed"
            if not status:
                await error_response(error)(scope, receive, send_marked)
        finally:
            outcome = state.get("outcome") or _outcome(status)
            # Paths are chosen by clients, so that only existing routes are counted by name.
            route = getattr(scope.get("route"), "path", "other")
            self._count(route, outcome)
            client = scope.get("client")
            log(
                "request", request_id=request_id, client=client[0] if client else None,
                method=scope["method"], route=route, status=status, outcome=outcome,
                seconds=round(time.monotonic() - started, 4), **state.get("told", {}),
            )  # fmt: skip


def _request_id(scope: Scope) -> str:
    """The client's own id, if it is fit for a log; else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _USABLE_ID.fullmatch(given[0]):
        return str(given[0].decode())
    return f"req-{secrets.token_hex(8)}"


def _outcome(status: int) -> str:
    if not status:
        return "cancelled"
    if status < 400:
        return "ok"
    return _OUTCOMES.get(status, "refused" if status < 500 else "failed")
