"""Limits on the answers in progress, in all and for each client; none begins during a drain.

Owns   the count of answers in progress, and the way to end them all.
Takes  requests as they begin and end; refuses those beyond a limit at once. A request counts from
       the arrival of its body on.
Never  queues: admitted requests wait in the engine's queue, and refused ones must be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minigpt4_runtime.server.failures import BROKEN, RETRY_SOON, Failure, queue_full


def _closed(message: str) -> Failure:
    return Failure(503, message, BROKEN, code="shutting_down", headers=RETRY_SOON)


class Slot:
    """One request's share of the server."""

    def __init__(self, admission: Admission, client: str | None) -> None:
        self._admission = admission
        self.client = client
        self.size = 0  # Until there is something to answer.
        # Ends this request with an error; None until it is in the engine.
        self.abort: Callable[[Exception], object] | None = None

    def grow(self, size: int) -> None:
        """Take room for `size` answers in all. A drain refuses only requests that have none yet.

        Raises:
            Failure: there is not enough.
        """
        if not self.size:
            self._admission.check_open()
        self._admission.check_room(size - self.size, self.client)
        self.size = size


class Admission:
    """Lets requests in, up to `limit` answers at once, `per_client` of them to one client."""

    def __init__(self, limit: int, per_client: int | None = None) -> None:
        self._limit = limit
        self._per_client = per_client
        self._slots: set[Slot] = set()
        self._reason: Exception | None = None  # Why new requests are refused.

    @property
    def num_taken(self) -> int:
        """How many answers are in progress."""
        return sum(slot.size for slot in self._slots)

    @property
    def is_answering(self) -> bool:
        """Whether any request in the engine has not ended."""
        return any(slot.abort for slot in self._slots)

    @property
    def why_closed(self) -> str | None:
        """Why new requests are refused; None if they are not."""
        return str(self._reason) if self._reason else None

    @contextmanager
    def enter(self, client: str | None = None) -> Iterator[Slot]:
        """Take a slot for as long as the request lasts; a client None is not counted.

        Raises:
            Failure: the server is full or drains.
        """
        self.check_open()
        self.check_room(1, client)
        slot = Slot(self, client)
        self._slots.add(slot)
        try:
            yield slot
        finally:
            self._slots.remove(slot)

    def check_open(self) -> None:
        """Refuse a new request during a drain.

        Raises:
            Failure: 503, with the time after which to try again.
        """
        if self._reason:
            raise self._reason

    def check_room(self, size: int, client: str | None) -> None:
        """Refuse `size` more answers if they would be too many.

        Raises:
            Failure: 429, with the time after which to try again.
        """
        no_room = f" and has no room for {size} more."
        if self.num_taken + size > self._limit:
            raise queue_full(f"The server answers {self._limit} requests at once{no_room}")
        own = sum(slot.size for slot in self._slots if slot.client == client)
        if client and self._per_client and own + size > self._per_client:
            raise queue_full(
                f"The server answers {self._per_client} requests of one client{no_room}"
            )

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._reason = self._reason or _closed("The server shuts down. Ask another, or try later.")

    async def drain(self, grace_seconds: float) -> bool:
        """Close, and wait for the answers in progress. False if some are left after that."""
        self.close()
        deadline = asyncio.get_running_loop().time() + grace_seconds
        while self.num_taken and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self.num_taken

    def abort_all(self, error: Exception | None = None) -> None:
        """End all answers in progress with an error, and refuse new requests."""
        self.close()
        error = error or _closed("The server shut down before this answer ended.")
        for slot in self._slots:
            if slot.abort:
                slot.abort(error)
