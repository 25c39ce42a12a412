"""One question about each of any number of images, with the engine kept full.

Owns   the threads that open images ahead, how far ahead they go, and the collecting.
Takes  images, and how one is submitted; gives results as they are done.
Never  opens an image itself, and knows no model.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import Described, TextDelta

P = TypeVar("P")


class ImageRun(Generic[P]):
    """The work of `describe_all`: threads open images and submit, one place collects."""

    def __init__(self, submit: Callable[[P], Ticket[TextDelta]], *, max_running: int) -> None:
        self._submit = submit
        self._num_threads = min(8, os.cpu_count() or 1)
        self._num_ahead = max_running + 4 * self._num_threads
        self._tickets: dict[int, tuple[Ticket[TextDelta], float]] = {}
        # An index whose ticket has news, a result, or an error that ends the run.
        self._news: queue.SimpleQueue[int | Described | BaseException] = queue.SimpleQueue()

    def of(self, images: Iterable[P]) -> Iterator[Described]:
        """Give results until all images are done."""
        numbered, num_open = enumerate(images), 0
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="images")
        try:
            while True:
                while num_open < self._num_ahead and (item := next(numbered, None)) is not None:
                    pool.submit(self._start, *item)
                    num_open += 1
                if not num_open:
                    return
                result = self._collect()
                if result is not None:
                    num_open -= 1
                    yield result
        finally:
            pool.shutdown(cancel_futures=True)
            for ticket, _ in self._tickets.values():
                ticket.cancel()

    def _start(self, index: int, image: P) -> None:
        started = time.perf_counter()
        try:
            ticket = self._submit(image)
        except RequestError as error:
            self._news.put(Described(index, None, error, time.perf_counter() - started))
        except BaseException as error:  # noqa: BLE001 - raised again where the results are read.
            self._news.put(error)
        else:
            self._tickets[index] = ticket, started
            self._news.put(index)

    def _collect(self) -> Described | None:
        """Wait for news, and give the result if an image is done."""
        try:
            # Windows hands Ctrl-C to Python only between two waits.
            news = self._news.get(timeout=0.5)
        except queue.Empty:
            return None
        if isinstance(news, BaseException):
            raise news
        if isinstance(news, Described):
            return news
        ticket, started = self._tickets[news]
        try:
            while (delta := ticket.poll(lambda: self._news.put(news))) is not None:
                if delta.reply:
                    del self._tickets[news]
                    return Described(news, delta.reply, None, time.perf_counter() - started)
        except RequestError as error:
            del self._tickets[news]
            return Described(news, None, error, time.perf_counter() - started)
        return None
