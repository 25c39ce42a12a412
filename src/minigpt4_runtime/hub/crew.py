"""Several jobs at once, until all are done, one fails, or Ctrl-C.

Owns   the threads.
Takes  jobs without arguments, and the event that tells them to stop.
Never  waits for a thread that is blocked by a host: the threads are daemons.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def run_jobs(
    jobs: Sequence[Callable[[], Result]], *, stop: threading.Event, num_threads: int = 4
) -> list[Result]:
    """Run all jobs, give their results in order; the first error stops the others and is raised."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    news: queue.SimpleQueue[tuple[int, Result | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                news.put((index, jobs[index](), None))
            except Exception as error:  # noqa: BLE001 - raised again where results are read.
                # In this order: errors of jobs that were stopped arrive after the first one.
                news.put((index, None, error))
                stop.set()

    for _ in range(min(num_threads, len(jobs))):
        threading.Thread(target=work, name="fetch", daemon=True).start()
    results: dict[int, Result] = {}
    try:
        while len(results) < len(jobs):
            try:
                # Windows hands Ctrl-C to Python only between two waits.
                index, result, error = news.get(timeout=0.5)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[index] = result  # type: ignore[assignment]
    finally:
        stop.set()
    return [results[index] for index in range(len(jobs))]
