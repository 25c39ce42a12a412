"""The server's log: a line for each request and each event.

Owns   the form of the lines, JSON or plain.
Takes  log records, with their fields under `extra={"fields": …}`.
Never  sees a key, a prompt or a picture, unless the server was started to log content.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["plain", "json"]
logger = logging.getLogger("minigpt4_runtime.server")


def set_up_logs(form: LogFormat) -> None:
    """Send the server's lines, and the warnings of every library, to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else PlainFormatter())
    handler.addFilter(_is_no_cancellation)
    logging.captureWarnings(True)
    for each, level in ((logger, logging.INFO), (logging.getLogger(), logging.WARNING)):
        each.handlers[:] = [handler]
        each.setLevel(level)
        each.propagate = False


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Leave out cancelled tasks: an open page's stream is cancelled when the server ends."""
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line: an event and its fields."""
    logger.log(level, event, extra={"fields": fields})


def log_failure(error: BaseException, **fields: Any) -> None:
    """Write where an unexpected error was raised; not its message, which may quote anything."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    name = type(error).__name__
    log("failure", level=logging.ERROR, error=name, places=places[-12:], **fields)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    message, error = record.getMessage(), {}
    if record.exc_info and record.exc_info[0]:
        # After the first line asyncio describes the failed task, and its error in full.
        message = message.partition("\n")[0]
        error["error"] = record.exc_info[0].__name__
    return {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": " ".join(message.split()),
        **getattr(record, "fields", {}),
        **error,
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        return json.dumps(_fields(record), default=str)


class PlainFormatter(logging.Formatter):
    """Time, level and event, then name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        fields = _fields(record)
        head = f"{fields.pop('time')} {fields.pop('level'):7} {fields.pop('event')}"
        # JSON escapes line ends in values that a client sent.
        return " ".join([head, *(f"{name}={json.dumps(v, default=str)}"
                                 for name, v in fields.items())])  # fmt: skip
