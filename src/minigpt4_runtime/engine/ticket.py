"""The handle that a caller holds while its request is answered.

Owns   the passing of one request's events from the engine's thread to any other, or to asyncio.
Takes  events; gives what `read` makes of them, in the reader's own thread.
Never  computes: a ticket that is not read slows down no other request.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from minigpt4_runtime.engine.request import TokenEvent
from minigpt4_runtime.errors import RequestError

T = TypeVar("T")
_SECONDS_BETWEEN_SIGNALS = 0.5


class Inbox:
    """The events of a request that have not been read yet."""

    def __init__(self, is_in_engine: Callable[[], bool] = lambda: False) -> None:
        """`is_in_engine` says whether it is asked in the thread that puts the events."""
        self.is_in_engine = is_in_engine
        self._items: deque[TokenEvent | Exception] = deque()
        self._lock = threading.Lock()
        self._alarms: list[Callable[[], object]] = []
        self.is_cancelled = False

    def put(self, item: TokenEvent | Exception) -> None:
        """Add an event, or the error that ends the request."""
        with self._lock:
            self._items.append(item)
        self._ring()

    def cancel(self) -> None:
        """Note that no more events are wanted, and wake all readers."""
        self.is_cancelled = True
        self._ring()

    def take(self, alarm: Callable[[], object]) -> TokenEvent | Exception | None:
        """Give the next item. If there is none, call `alarm` once there is one."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._alarms.append(alarm)
            return None

    def _ring(self) -> None:
        with self._lock:
            alarms, self._alarms = self._alarms, []
        for alarm in alarms:
            try:
                alarm()
            except Exception as error:  # noqa: BLE001 - the reader's own; other requests go on.
                self.put(error)


class Ticket(Generic[T]):
    """An answer as it grows: iterate it, `async for` it, or cancel it.

    An error that ends the request is raised where the ticket is read. A ticket that is dropped
    cancels its request.
    """

    def __init__(self, inbox: Inbox, read: Callable[[TokenEvent], T | None]) -> None:
        self._inbox = inbox
        self._read = read
        self._is_over = False

    def cancel(self) -> None:
        """End the request: it is forgotten before the next step, and the ticket ends here."""
        self._is_over = True
        self._inbox.cancel()

    def __del__(self) -> None:
        # Rings no alarm: this may run while any lock is held.
        self._inbox.is_cancelled = True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while not self._is_over:
            came = threading.Event()
            value = self.poll(came.set)
            if value is not None:
                return value
            with self._cancelled_on_error():
                if self._inbox.is_in_engine():
                    raise RequestError(
                        "A processor waits for an answer of the model that waits for it. Ask "
                        "before, give the other prompt as a branch, or load a second model."
                    )
                # Windows hands Ctrl-C to Python only between two waits.
                while not (self._is_over or came.wait(_SECONDS_BETWEEN_SIGNALS)):
                    pass
        raise StopIteration

    def poll(self, alarm: Callable[[], object]) -> T | None:
        """Give the next piece if it has come.

        Else None, and `alarm` is called once there is more, from the engine's thread.
        """
        with self._cancelled_on_error():
            while not self._is_over:
                item = self._inbox.take(alarm)
                if item is None:
                    return None
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason:
                    self._is_over = True
                value = self._read(item)
                if value is not None:
                    return value
        return None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        loop = asyncio.get_running_loop()
        while not self._is_over:
            came = asyncio.Event()

            def alarm(came: asyncio.Event = came) -> None:
                # The loop may have been closed in the meantime.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(came.set)

            value = self.poll(alarm)
            if value is not None:
                return value
            if not self._is_over:
                with self._cancelled_on_error():
                    await came.wait()
        raise StopAsyncIteration

    @contextlib.contextmanager
    def _cancelled_on_error(self) -> Iterator[None]:
        """Ctrl-C, a cancelled task and a failed request all end the ticket."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise
