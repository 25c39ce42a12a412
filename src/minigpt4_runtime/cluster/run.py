"""A run over all images of a list: workers are started, fed and replaced, shards are written.

Owns   the connection to Ray, the workers, and the records of shards that are not whole yet.
Takes  a Job, a RunFolder and a WorkerPlan; gives news of each task, and a Tally at the end.
Never  trusts a worker: until the answer of a task is here, the task counts as not done.

This program alone writes, and each file is whole. So there is exactly one record for each image,
whatever is lost: a worker or a machine (its tasks go to others), or this program (`resume`).
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from minigpt4_runtime.batch.results import Record
from minigpt4_runtime.cluster.dispatch import TASKS_AT_ONCE, Dispatch, Task
from minigpt4_runtime.cluster.run_folder import RunFolder
from minigpt4_runtime.cluster.worker import Job, Worker
from minigpt4_runtime.errors import (
    BackendUnavailableError,
    ConfigError,
    MiniGPT4Error,
    RankLostError,
)
from minigpt4_runtime.optional import require

AUTO = "auto"
MOST_PICTURES_PER_TASK = 128
# Pictures that are described together cost less each (docs/scaling.md has what was measured).
FEW_PICTURES_PER_TASK = 16
MOST_FAILURES_SHOWN = 20
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_GIVEN_UP = (
    "The process that described it ended, and then another one. There may be too little memory: "
    "Ray's log of the worker says more."
)


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """The workers: how many (None is as many as the cluster holds), and what each takes of it."""

    address: str = AUTO
    num_workers: int | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"{self.num_workers} workers describe nothing: ask for 1 or more.")
        is_part = all(math.isfinite(each) and each >= 0 for each in (self.cpus, self.gpus))
        if not is_part or not (self.cpus or self.gpus):
            raise ConfigError(
                f"A worker takes {self.cpus:g} CPUs and {self.gpus:g} GPUs; it needs a part of "
                "one or the other."
            )


@dataclass
class Tally:
    """What became of the images. `failures` are the first ones: (image, error)."""

    described: int = 0
    failed: int = 0
    done_before: int = 0
    outgrown: int = 0
    cut_off: int = 0
    lost_workers: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def count(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count new records."""
        for row in rows:
            self.outgrown += bool(row["evicted_tokens"])
            self.cut_off += row["finish_reason"] == "length"
            if row["error"] is None:
                self.described += 1
                continue
            self.failed += 1
            if len(self.failures) < MOST_FAILURES_SHOWN:
                self.failures.append((row["image"], row["error"]))


def describe_names(
    job: Job,
    folder: RunFolder,
    plan: WorkerPlan,
    *,
    on_start: Callable[[int, int], object] = lambda *_: None,
    on_done: Callable[[int], object] = lambda _: None,
) -> Tally:
    """Describe what has no answer in the folder yet, and write it there.

    `on_start` is told how many images are left and how many workers there will be; `on_done` how
    many images are done each time, and first of all 0, when a worker is ready.

    Raises:
        BackendUnavailableError: Ray is not installed or not reachable, or workers die at once.
        ConfigError: no machine has what a worker takes, or the folder cannot be written.
        MiniGPT4Error: the model cannot be loaded, or cannot be asked this.
    """
    remaining = dict(folder.to_ask())
    num_remaining = sum(map(len, remaining.values()))
    tally = Tally(done_before=len(folder.names) - num_remaining)
    if not num_remaining:
        return tally
    with _connected(plan.address) as ray:
        num_workers = min(plan.num_workers or _room(ray, plan), num_remaining)
        on_start(num_remaining, num_workers)
        tasks = list(_cut(remaining, num_workers))
        shards = OpenShards(folder, {shard: len(each) for shard, each in remaining.items()}, tally)
        with _Workers(ray, job, plan, folder.names) as workers:
            _feed(workers, Dispatch(tasks), shards, min(num_workers, len(tasks)), on_done)
            tally.lost_workers = workers.num_lost
    return tally


def _cut(remaining: Mapping[int, Sequence[int]], num_workers: int) -> Iterator[Task]:
    """Tasks within shards: large enough to be cheap, small enough that all workers have some.

    Each worker gets those that it does at once, and as many again if they are not few pictures.
    """
    num_remaining = sum(map(len, remaining.values()))
    once, twice = (-(-num_remaining // (rounds * TASKS_AT_ONCE * num_workers)) for rounds in (1, 2))
    most = min(MOST_PICTURES_PER_TASK, max(twice, min(once, FEW_PICTURES_PER_TASK)))
    for positions in remaining.values():
        for start in range(0, len(positions), most):
            yield Task(positions[start : start + most])


class OpenShards:
    """Records of shards that are not whole yet."""

    def __init__(self, folder: RunFolder, num_missing: dict[int, int], tally: Tally) -> None:
        self._folder = folder
        self._num_missing = num_missing
        self._tally = tally
        self._rows: dict[int, dict[int, Mapping[str, Any]]] = {}

    def add(self, positions: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the records of one task, and write the shard if it is whole."""
        shard = self._folder.shard_of(positions[0])
        found = self._rows.setdefault(shard, {})
        found.update(zip(positions, rows, strict=True))
        if len(found) == self._num_missing[shard]:
            self._folder.write(shard, found)
            self._tally.count([found[position] for position in sorted(found)])
            del self._rows[shard]

    def give_up(self, positions: Sequence[int]) -> None:
        """Record images whose workers died."""
        for position in positions:
            record = Record(image=self._folder.names[position], seconds=0.0, error=_GIVEN_UP)
            self.add([position], [asdict(record)])


def _feed(
    workers: _Workers,
    dispatch: Dispatch,
    shards: OpenShards,
    num_workers: int,
    on_done: Callable[[int], object],
) -> None:
    """Give tasks to workers until all are done, with a new worker for each that died."""
    deaths: list[str] = []  # Why, since a task was done last.
    for _ in range(num_workers):
        workers.start()
    has_begun = False
    while not dispatch.is_done:
        for worker, task, rows in workers.news():
            dispatch.finish(worker, task)
            shards.add(task.positions, rows)
            on_done(len(task.positions))
            deaths.clear()
        for worker, reason in workers.take_dead():
            deaths.append(reason)
            if given_up := dispatch.bury(worker):
                shards.give_up(given_up)
                on_done(len(given_up))
                deaths.clear()
            workers.start()
        if len(deaths) > max(8, 4 * num_workers):
            raise BackendUnavailableError(
                f"{len(deaths)} workers ended one after the other and described nothing. "
                f"The last one: {deaths[-1]}"
            )
        if workers.ready and not has_begun:
            has_begun = True
            on_done(0)
        for worker in workers.ready:  # All: what a dead one had may be for one that is idle.
            while following := dispatch.next_for(worker):
                workers.ask(worker, following)


class _Workers:
    """The workers of a run, known by numbers. They end with it."""

    def __init__(self, ray: Any, job: Job, plan: WorkerPlan, names: Sequence[str]) -> None:
        self._ray = ray
        self._names = names
        self._job = ray.put(job)
        # The driver starts new ones itself: a restarted one would wait for its own machine.
        self._make = ray.remote(Worker).options(
            num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0, max_task_retries=0,
            max_concurrency=TASKS_AT_ONCE, scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, tuple[int, Task | None]] = {}
        self._dead: dict[int, str] = {}
        self._num_started = 0
        self.ready: list[int] = []  # Those that can be asked.

    @property
    def num_lost(self) -> int:
        """How many have died."""
        return self._num_started - len(self._actors)

    def start(self) -> None:
        """Start one more. It is ready when its model is loaded."""
        number, self._num_started = self._num_started, self._num_started + 1
        self._actors[number] = self._make.remote(self._job)
        self._asked[self._actors[number].load.remote()] = number, None

    def ask(self, worker: int, task: Task) -> None:
        """Let a worker do a task."""
        names = [self._names[position] for position in task.positions]
        self._asked[self._actors[worker].describe.remote(names)] = worker, task

    def news(self) -> Iterator[tuple[int, Task, list[dict[str, Any]]]]:
        """Wait a while, and give what is done: the worker, its task, and the records.

        Raises:
            MiniGPT4Error: what a worker raised on purpose: no other could do it.
        """
        ready, _ = self._ray.wait(list(self._asked), timeout=_LOOK_SECONDS)
        for reference in ready:
            if reference not in self._asked:
                continue  # Of a worker that has just been dropped.
            worker, task = self._asked.pop(reference)
            try:
                rows = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, MiniGPT4Error) and not isinstance(cause, RankLostError):
                    raise cause from None
                # An engine that failed cannot be trusted, and its process ends, as in the server.
                self._drop(worker, " ".join(str(error).split())[:500])
            else:
                if task is None:
                    self.ready.append(worker)
                else:
                    yield worker, task, rows

    def _drop(self, worker: int, reason: str) -> None:
        """Forget a worker that died, failed or cannot be reached, and what it was asked."""
        self._asked = {key: value for key, value in self._asked.items() if value[0] != worker}
        # One that cannot be reached may live on; it must not hold a place.
        self._ray.kill(self._actors.pop(worker), no_restart=True)
        self.ready = [each for each in self.ready if each != worker]
        self._dead[worker] = reason

    def take_dead(self) -> Iterator[tuple[int, str]]:
        """Those that ended since this was asked last, with Ray's words about it."""
        while self._dead:
            yield self._dead.popitem()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for actor in self._actors.values():
            with suppress(Exception):  # Ray may be gone, and the workers with it.
                self._ray.kill(actor, no_restart=True)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected: to `address`, or for "auto" to this machine's cluster or a new one.

    A connection that this program has already is used as it is, and kept.

    Raises:
        BackendUnavailableError: Ray is not installed, or nothing answers there.
    """
    # It would tell its makers of each cluster that is started.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(address)
    try:
        ray.init(
            address=None if address == AUTO else address, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise _no_cluster(address, reason) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Connect to HOST:PORT once: Ray itself tries for minutes, and tells each failure.

    Raises:
        BackendUnavailableError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"No Ray cluster answers at {address} ({reason}). Start one with `ray start --head`, or "
        "leave the address out."
    )


def _room(ray: Any, plan: WorkerPlan) -> int:
    """How many workers the machines of the cluster hold.

    Raises:
        ConfigError: none.
    """
    wanted = {"CPU": plan.cpus, "GPU": plan.gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_workers = sum(
        min(int(machine.get(kind, 0) / amount) for kind, amount in wanted.items() if amount)
        for machine in machines
    )
    if not num_workers:
        raise ConfigError(
            f"No machine of the Ray cluster has {plan.cpus:g} CPUs and {plan.gpus:g} GPUs for a "
            "worker. Ask for less, or name the number of workers to wait for such a machine."
        )
    return num_workers
