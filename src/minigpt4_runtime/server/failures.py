"""Errors as HTTP statuses and as OpenAI's error objects.

Owns   the one table from an error's class to a status, and the shape of an error's body.
Takes  any exception; gives a Failure.
Never  shows a client the message of an unexpected error, which may quote anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from minigpt4_runtime.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    GrammarError,
    ImageError,
    MiniGPT4Error,
    PromptTooLongError,
    RankLostError,
    RequestError,
)

INVALID = "invalid_request_error"
BROKEN = "server_error"
RETRY_SOON = {"Retry-After": "1"}

# An error with status 500 may quote the message of an unexpected one.
_SILENT = "The server failed on this request. Its log has more under the request id."
_MOST_CHARACTERS = 500
_IMAGE = re.compile(r"data:[^\s'\",]*[,;][^\s'\"]{16,}", re.IGNORECASE)
# Errors that are about the field with the dialogue or the text.
_ABOUT_CONTENT = (ImageError, PromptTooLongError)
# Error class → status, OpenAI's type, OpenAI's code.
STATUSES: dict[type[MiniGPT4Error], tuple[int, str, str | None]] = {
    MiniGPT4Error: (500, BROKEN, None),
    ConfigError: (400, INVALID, "invalid_value"),
    CheckpointError: (500, BROKEN, "model_broken"),
    RequestError: (400, INVALID, "invalid_value"),
    GrammarError: (400, INVALID, "invalid_grammar"),
    ImageError: (400, INVALID, "invalid_image"),
    PromptTooLongError: (400, INVALID, "context_length_exceeded"),
    BackendUnavailableError: (503, BROKEN, "backend_unavailable"),
    RankLostError: (503, BROKEN, "engine_failed"),
}


@dataclass(eq=False)
class Failure(Exception):
    """An error as the client sees it: HTTP status and headers, and OpenAI's error object."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def as_body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's shape, in a body or in an event of a stream."""
        error = {"message": brief(self.message), "type": self.kind}
        return {"error": {**error, "param": self.param, "code": self.code}}


def brief(message: str) -> str:
    """A message with its long quotations cut, such as pictures that were sent."""
    told = _IMAGE.sub("data:…", message[: 4 * _MOST_CHARACTERS])
    return told if len(told) <= _MOST_CHARACTERS else told[:_MOST_CHARACTERS] + "…"


def queue_full(message: str) -> Failure:
    """The server has no room at the moment."""
    told = f"{message} Try again later."
    return Failure(429, told, "rate_limit_error", code="queue_full", headers=RETRY_SOON)


def no_such_model(asked: str, own: Sequence[str]) -> Failure:
    """The request names another model than this server's own."""
    known = f"{'these are' if own[1:] else 'this is'} {', '.join(map(repr, own))}"
    message = f"There is no model {asked[:100]!r} here; {known}."
    return Failure(404, message, param="model", code="model_not_found")


def failure_of(error: BaseException, subject: str = "messages") -> Failure:
    """Translate any error; `subject` is the request's field with the dialogue or the text."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, HTTPException):
        kind = INVALID if error.status_code < 500 else BROKEN
        return Failure(error.status_code, str(error.detail), kind)
    for cls in type(error).__mro__:
        if cls in STATUSES:
            status, kind, code = STATUSES[cls]
            message = str(error) if status != 500 else _SILENT
            param = subject if cls in _ABOUT_CONTENT else None
            return Failure(status, message, kind, param, code)
    return Failure(500, _SILENT, BROKEN)


def error_response(error: BaseException) -> JSONResponse:
    """The whole answer to a request that failed before its answer began."""
    failure = failure_of(error)
    headers = getattr(error, "headers", None)
    return JSONResponse(failure.as_body(), failure.status, headers=headers)
