"""Which task a worker gets next, and what becomes of the tasks of one that died.

Owns   the tasks that wait, and those that each worker has.
Takes  tasks; the news that one is done, or that a worker died. Gives the next task of a worker.
Never  knows Ray, a model or a record: it can be tested with thousands of random deaths.

A task whose worker died is a suspect: perhaps one of its images ended the process. It is done alone
in a worker, so that no other is blamed for it; after its second death it is halved, and a single
image is given up. So one image that ends every process costs a few workers and no other record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# While one ends, the next has begun: the engine of a worker does not run empty.
TASKS_AT_ONCE = 2
DEATHS_OF_A_SUSPECT = 2


@dataclass(frozen=True, eq=False)
class Task:
    """Images to describe, by their positions in the list, and how often their worker died."""

    positions: Sequence[int]
    deaths: int = 0


class Dispatch:
    """The tasks of a run. Workers are known by a number."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._fresh = deque(tasks)
        self._suspects: deque[Task] = deque()
        self._running: dict[int, list[Task]] = {}

    @property
    def num_waiting(self) -> int:
        """How many tasks no worker has."""
        return len(self._fresh) + len(self._suspects)

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self.num_waiting or any(self._running.values()))

    def next_for(self, worker: int) -> Task | None:
        """Give the worker one more task, if it may have one."""
        running = self._running.setdefault(worker, [])
        if not running and self._suspects:
            running.append(self._suspects.popleft())
        elif self._fresh and len(running) < TASKS_AT_ONCE and not any(t.deaths for t in running):
            running.append(self._fresh.popleft())
        else:
            return None
        return running[-1]

    def finish(self, worker: int, task: Task) -> None:
        """Note that a task is done."""
        self._running[worker].remove(task)

    def bury(self, worker: int) -> list[int]:
        """Take back the tasks of a worker that died; give the positions that are given up."""
        given_up: list[int] = []
        for task in self._running.pop(worker, []):
            deaths, middle = task.deaths + 1, len(task.positions) // 2
            if deaths < DEATHS_OF_A_SUSPECT:
                self._suspects.append(Task(task.positions, deaths))
            elif middle:
                halves = task.positions[:middle], task.positions[middle:]
                self._suspects += [Task(half, deaths - 1) for half in halves]
            else:
                given_up += task.positions
        return given_up
