"""What went wrong, as HTTP says it and as OpenAI writes it.

Owns   the one table from an error's class to a status, and the shape of an error's body.
Takes  any exception; gives a Failure.
Never  shows a client what an error that nobody raised on purpose says: it may quote anything.
"""

from __future__ import annotations

from dataclasses import dataclass

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

# Its own error may quote another that nobody raised on purpose.
_SILENT = "The server failed on this request. Its log has more under the request id."
# What a request is about where its error cannot name a parameter itself.
_PARAMS: dict[type[MiniGPT4Error], str] = {ImageError: "messages", PromptTooLongError: "messages"}
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


class Refusal(Exception):
    """A request that the server itself turns down, with all that the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.failure = Failure(status, message, kind, param, code)
        self.headers = headers or {}


@dataclass(frozen=True)
class Failure:
    """An HTTP status and the content of OpenAI's error object."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None

    def as_body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's shape, in a body or in an event of a stream."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def no_such_model(asked: str, own: str) -> Refusal:
    """Another model was asked for than the one that is here."""
    message = f"There is no model {asked[:100]!r} here; this is {own!r}."
    return Refusal(404, message, param="model", code="model_not_found")


def refusal_about(error: MiniGPT4Error, subject: str) -> Refusal:
    """The same error, said of the field that a request has in place of `messages`."""
    failure = failure_of(error)
    param = subject if failure.param == "messages" else failure.param
    return Refusal(
        failure.status, failure.message, kind=failure.kind, param=param, code=failure.code
    )


def failure_of(error: BaseException) -> Failure:
    """Translate any error."""
    if isinstance(error, Refusal):
        return error.failure
    if isinstance(error, HTTPException):
        kind = INVALID if error.status_code < 500 else BROKEN
        return Failure(error.status_code, str(error.detail), kind)
    for cls in type(error).__mro__:
        if cls in STATUSES:
            status, kind, code = STATUSES[cls]
            message = str(error) if status != 500 else _SILENT
            return Failure(status, message, kind, _PARAMS.get(cls), code)
    return Failure(500, _SILENT, BROKEN)


def error_response(error: BaseException) -> JSONResponse:
    """The whole answer to a request that failed before its answer began."""
    failure = failure_of(error)
    headers = getattr(error, "headers", None)
    return JSONResponse(failure.as_body(), failure.status, headers=headers)
