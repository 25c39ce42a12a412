"""What a caller holds while its request is answered.

Owns   the passing of one request's events from the engine's thread to any other, or to asyncio.
Takes  events; gives what `read` makes of them, in the reader's own thread.
Never  computes: who does not read a ticket slows nobody down.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from minigpt4_runtime.engine.request import TokenEvent

T = TypeVar("T")
_SECONDS_BETWEEN_SIGNALS = 0.5


class Inbox:
    """Where a request's events wait to be read. It outlives neither the request nor the ticket."""

    def __init__(self) -> None:
        self._items: deque[TokenEvent | Exception] = deque()
        self._changed = threading.Condition()
        self._alarms: list[Callable[[], object]] = []
        self.is_cancelled = False

    def put(self, item: TokenEvent | Exception) -> None:
        """Add an event, or the error that ends the request."""
        with self._changed:
            self._items.append(item)
            alarms = self._wake()
        self._ring(alarms)

    def cancel(self) -> None:
        """Say that nobody wants more, and wake whoever waits for it."""
        with self._changed:
            self.is_cancelled = True
            alarms = self._wake()
        self._ring(alarms)

    def take(self) -> TokenEvent | Exception | None:
        """Wait for the next item. None where it was cancelled instead."""
        with self._changed:
            # Windows hands Ctrl-C to Python only between two waits.
            while not self._changed.wait_for(self._has_news, _SECONDS_BETWEEN_SIGNALS):
                pass
            return self._items.popleft() if self._items else None

    def take_now(self, alarm: Callable[[], object]) -> TokenEvent | Exception | None:
        """The next item; where there is none yet, `alarm` is called once there is."""
        with self._changed:
            if self._items:
                return self._items.popleft()
            self._alarms.append(alarm)
            return None

    def _has_news(self) -> bool:
        return bool(self._items) or self.is_cancelled

    def _wake(self) -> list[Callable[[], object]]:
        """Wake who waits; give the alarms to ring once the lock is free."""
        self._changed.notify_all()
        alarms, self._alarms = self._alarms, []
        return alarms

    def _ring(self, alarms: list[Callable[[], object]]) -> None:
        for alarm in alarms:
            try:
                alarm()
            except Exception as error:  # noqa: BLE001 - the reader's own; it stops nobody else.
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
        # No more: nobody waits for it, and this may run while any lock is held.
        self._inbox.is_cancelled = True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while not self._is_over:
            with self._cancelled_on_error():
                value = self._take_in(self._inbox.take())
            if value is not None:
                return value
        raise StopIteration

    def poll(self, alarm: Callable[[], object]) -> T | None:
        """Give the next piece if it has come.

        Else None, and `alarm` is called once there is more, from the engine's thread.
        """
        while not self._is_over:
            item = self._inbox.take_now(alarm)
            if item is None:
                return None
            with self._cancelled_on_error():
                value = self._take_in(item)
            if value is not None:
                return value
        return None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while not self._is_over:
            with self._cancelled_on_error():
                value = self._take_in(await self._next_item())
            if value is not None:
                return value
        raise StopAsyncIteration

    async def _next_item(self) -> TokenEvent | Exception | None:
        loop = asyncio.get_running_loop()
        while True:
            came = asyncio.Event()

            def alarm(came: asyncio.Event = came) -> None:
                # A loop that was closed meanwhile has nobody left to wake.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(came.set)

            item = self._inbox.take_now(alarm)
            if item is not None or self._inbox.is_cancelled:
                return item
            await came.wait()

    def _take_in(self, item: TokenEvent | Exception | None) -> T | None:
        if item is None:
            return None
        if isinstance(item, Exception):
            raise item
        if item.finish_reason:
            self._is_over = True
        return self._read(item)

    @contextlib.contextmanager
    def _cancelled_on_error(self) -> Iterator[None]:
        """Ctrl-C, a cancelled task and a failed request all end the ticket."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise
