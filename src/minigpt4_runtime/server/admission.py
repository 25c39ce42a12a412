"""Who is let in: so many at once, so many of one client, and nobody while the server drains.

Owns   the count of answers under way, and the way to end them all.
Takes  requests that come and go; refuses those beyond a limit at once. A request counts from when
       its body is there: one that is never sent takes nothing from the others.
Never  queues: who is let in waits in the engine's queue, everybody else is told to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minigpt4_runtime.server.failures import BROKEN, Failure

_RETRY_SECONDS = "1"


def _closed(message: str) -> Failure:
    headers = {"Retry-After": _RETRY_SECONDS}
    return Failure(503, message, kind=BROKEN, code="shutting_down", headers=headers)


def _full(what: str, size: int) -> Failure:
    return Failure(
        429,
        f"{what} and has no room for {size} more. Try again later.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": _RETRY_SECONDS},
    )


class Place:
    """One request's share of the server."""

    def __init__(self, admission: Admission, client: str | None) -> None:
        self._admission = admission
        self.client = client
        self.size = 0  # Until there is something to answer.
        # Ends this request with an error; None until the engine was asked.
        self.abort: Callable[[Exception], object] | None = None

    def grow(self, size: int) -> None:
        """Take room for `size` answers in all.

        Raises:
            Failure: there is not enough.
        """
        self._admission.check_room(size - self.size, self.client)
        self.size = size


class Admission:
    """Lets requests in, up to `limit` answers at once, `per_client` of them to one client."""

    def __init__(self, limit: int, per_client: int | None = None) -> None:
        self._limit = limit
        self._per_client = per_client
        self._places: set[Place] = set()
        self._reason: Exception | None = None  # Why nobody is let in any more.

    @property
    def num_taken(self) -> int:
        """How many answers are under way."""
        return sum(place.size for place in self._places)

    @property
    def is_answering(self) -> bool:
        """Whether the engine was asked for anything that has not come to its end."""
        return any(place.abort for place in self._places)

    @property
    def why_closed(self) -> str | None:
        """Why nobody is let in any more, if so."""
        return str(self._reason) if self._reason else None

    @contextmanager
    def enter(self, client: str | None = None) -> Iterator[Place]:
        """Come in for as long as the request lasts; `client` is None for one that is not counted.

        Raises:
            Failure: the server is full or drains.
        """
        self.check_room(1, client)
        place = Place(self, client)
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.remove(place)

    def check_room(self, size: int, client: str | None) -> None:
        """Refuse what would be too many.

        Raises:
            Failure: 429, with the time after which to try again; 503 for what is new in a drain.
        """
        if self._reason:
            raise self._reason
        if self.num_taken + size > self._limit:
            raise _full(f"The server answers {self._limit} requests at once", size)
        own = sum(place.size for place in self._places if place.client == client)
        if client and self._per_client and own + size > self._per_client:
            raise _full(f"The server answers {self._per_client} requests of one client", size)

    def close(self) -> None:
        """Let nobody in any more."""
        self._reason = self._reason or _closed("The server shuts down. Ask another, or try later.")

    async def drain(self, grace_seconds: float) -> bool:
        """Let nobody in, and wait for those inside. False if some are still there then."""
        self.close()
        deadline = asyncio.get_running_loop().time() + grace_seconds
        while self.num_taken and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self.num_taken

    def abort_all(self, error: Exception | None = None) -> None:
        """End what is under way, with an error to each, and let nobody in."""
        self.close()
        error = error or _closed("The server shut down before this answer ended.")
        for place in self._places:
            if place.abort:
                place.abort(error)
