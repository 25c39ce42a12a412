"""What a picture costs on Ray beside a plain run, and what a run costs before its first picture.

python benchmarks/ray_scaling.py
python benchmarks/ray_scaling.py --counts 10,100,1000,10000 --workers 1,2 --json ray.json

Pictures are drawn for it, and the demo model describes each once, greedily. "plain" is
`MiniGPT4.describe_all` in this process with a record appended for each, as `minigpt4 describe` does
it; Ray's runs are those of `minigpt4 describe --ray` on a cluster that is there. Seconds are of the
processor, by who used them: this program, the workers and Ray's own processes. They are counted in
two parts: until the first model is loaded, and from then on, where what a worker used until its own
model was loaded is apart. The clock's seconds say little where other programs run.

A second table has the processor's milliseconds for a picture, and the ratio to the plain run of the
largest count. `--repeat` runs everything so often, in turn, and takes medians.
(Linux: processor times are read from /proc.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.batch.results import Record
from minigpt4_runtime.cluster import run
from minigpt4_runtime.cluster.result_places import LocalPlace
from minigpt4_runtime.cluster.run import WorkerPlan, describe_names
from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice
from minigpt4_runtime.cluster.worker import Job, Worker
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.files import append_record
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

MARK = "RAY_SCALING_RUN"
# A worker writes here what it used until its model was loaded.
LOADED = "RAY_SCALING_LOADED"
WHO = ("program", "workers", "ray")
# Of each process: who it is, and its seconds of the processor.
Used = dict[int, tuple[str, float]]


@dataclass
class Cost:
    """Seconds of the processor in a run, by who used them; `workers` 0 is the plain run.

    `start` ends and `work` begins when the first model is loaded. `later_loads` is what the other
    workers used of `work` until their own models were loaded.
    """

    workers: int
    pictures: int
    start: dict[str, float]
    work: dict[str, float]
    later_loads: float
    wall_start: float
    wall_work: float

    @property
    def per_picture(self) -> float:
        """Seconds for a picture, once models are loaded."""
        return (sum(self.work.values()) - self.later_loads) / self.pictures


class Clock:
    """Reads both clocks at the start, when a model is ready, and when a picture is done last."""

    def __init__(self, read: Callable[[], Used]) -> None:
        self._read = read
        self._readings = [(time.perf_counter(), read())]

    def done(self, _count: int) -> None:
        """Take the news. Only the first and the latest are kept."""
        self._readings = [*self._readings[:2], (time.perf_counter(), self._read())]

    def cost(self, workers: int, pictures: int, loaded: dict[int, float]) -> Cost:
        """What was used between. `loaded` is what processes had used when a model was loaded."""
        (wall_0, used_0), (wall_1, used_1), (wall_2, used_2) = self._readings
        until_loaded = [
            {
                process: (who, min(seconds, loaded.get(process, seconds)))
                for process, (who, seconds) in used.items()
            }
            for used in (used_1, used_2)
        ]
        return Cost(
            workers, pictures, start=between(used_0, used_1), work=between(used_1, used_2),
            later_loads=between(*until_loaded)["workers"], wall_start=wall_1 - wall_0,
            wall_work=wall_2 - wall_1,
        )  # fmt: skip


def between(before: Used, after: Used) -> dict[str, float]:
    """Seconds of the processor, by who used them."""
    seconds = dict.fromkeys(WHO, 0.0)
    for process, (who, used) in after.items():
        seconds[who] += used - before.get(process, (who, 0.0))[1]
    return seconds


class MarkedProcesses:
    """This process and all that carry the mark, Ray's own included, also those that have ended."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._used: Used = {}

    def used(self) -> Used:
        """What each has used until now."""
        second = os.sysconf("SC_CLK_TCK")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                who = self._who(folder)
                fields = (folder / "stat").read_text().rpartition(")")[2].split() if who else []
            except OSError:  # It has ended.
                continue
            if who:
                self._used[int(folder.name)] = who, (int(fields[11]) + int(fields[12])) / second
        return dict(self._used)

    def _who(self, folder: Path) -> str | None:
        if folder.name == str(os.getpid()):
            return "program"
        if self._mark not in (folder / "environ").read_bytes():
            return None
        # Before it has an actor, a worker is an idle process of Ray's.
        if (folder / "cmdline").read_bytes().startswith((b"ray::MeasuredWorker", b"ray::IDLE")):
            return "workers"
        return "ray"


class MeasuredWorker(Worker):
    """Writes down what its process used until its model was loaded."""

    def load(self) -> None:
        """Load, and write it down."""
        super().load()
        path = Path(os.environ[LOADED]) / str(os.getpid())
        path.write_text(str(time.process_time()), encoding="utf-8")


def draw_pictures(folder: Path, count: int) -> list[str]:
    """Draw scenes, each another; give their paths."""
    rng = random.Random(1)
    paths = [folder / f"{number:06}.png" for number in range(count)]
    for path in paths:
        scenes.draw(scenes.random_scene(rng, held_out=True), rng, side=112).save(path)
    return list(map(str, paths))


def run_plainly(names: list[str], out: Path) -> Cost:
    """Describe in this process."""
    clock = Clock(lambda: {os.getpid(): ("program", time.process_time())})
    with MiniGPT4.load() as model:
        clock.done(0)
        for described in model.describe_all(names):
            append_record(out, asdict(Record.of(names[described.index], described)))
        clock.done(len(names))
    out.unlink()
    return clock.cost(0, len(names), {})


def run_on_ray(names: list[str], folder: Path, workers: int, processes: MarkedProcesses) -> Cost:
    """Describe with so many workers."""
    loaded = Path(os.environ[LOADED])
    shutil.rmtree(loaded, ignore_errors=True)
    loaded.mkdir()
    clock = Clock(processes.used)
    shards = RunFolder.open(LocalPlace(folder), names, {}, ShardChoice(), resume=False)
    job = Job(model={}, prompt=DESCRIBE_PROMPT, sampling=SamplingParams(), folder=Path("/"))
    tally = describe_names(job, shards, WorkerPlan(num_workers=workers), on_done=clock.done)
    if tally.described != len(names):
        raise SystemExit(f"{tally.failed} pictures failed: {tally.failures[:1]}")
    shutil.rmtree(folder)
    at_load = {int(each.name): float(each.read_text()) for each in loaded.iterdir()}
    return clock.cost(workers, len(names), at_load)


def median(costs: list[Cost]) -> Cost:
    """The run whose pictures cost the median."""
    return sorted(costs, key=lambda cost: cost.per_picture)[len(costs) // 2]


def as_tables(costs: list[Cost]) -> str:
    """Seconds of each run, and milliseconds for a picture."""
    base = max((cost for cost in costs if not cost.workers), key=lambda cost: cost.pictures)
    first = [
        "| run | pictures | until a model is loaded: program | workers | Ray | then: program "
        "| workers | of it later loads | Ray |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    second = ["| run | pictures | ms a picture | ratio |", "|---|---|---|---|"]
    for cost in costs:
        kind = f"Ray, workers: {cost.workers}" if cost.workers else "plain"
        parts = [
            *(cost.start[who] for who in WHO), cost.work["program"], cost.work["workers"],
            cost.later_loads, cost.work["ray"],
        ]  # fmt: skip
        cells = " | ".join(f"{seconds:.2f}" for seconds in parts)
        first.append(f"| {kind} | {cost.pictures} | {cells} |")
        ratio = cost.per_picture / base.per_picture
        second.append(f"| {kind} | {cost.pictures} | {1000 * cost.per_picture:.1f} | {ratio:.2f} |")
    return "\n".join([*first, "", *second])


def idle_ray(processes: MarkedProcesses, seconds: float) -> float:
    """Seconds of the processor in a second, which Ray's own processes use when nothing runs."""
    before = processes.used()
    time.sleep(seconds)
    return between(before, processes.used())["ray"] / seconds


def main() -> None:
    """Run every count plainly and with every number of workers, and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", default="10,100,1000,10000")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = sorted(map(int, options.counts.split(",")))
    torch.set_num_threads(1)
    mark = os.environ[MARK] = uuid.uuid4().hex
    # Each process of Ray has one thread for products, and so has the plain run.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.Worker = MeasuredWorker  # type: ignore[attr-defined]
    ray: Any = require("ray", extra="ray")
    found: dict[tuple[int, int], list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="rayscaling") as name:
        folder = Path(name)
        os.environ[LOADED] = str(folder / "loaded")
        (folder / "pictures").mkdir()
        names = draw_pictures(folder / "pictures", counts[-1])
        started = time.perf_counter()
        processes = MarkedProcesses(mark)
        before = processes.used()
        ray.init(log_to_driver=False, logging_level="ERROR")
        begun = between(before, processes.used())
        print(
            f"Ray's start: {time.perf_counter() - started:.1f} s, of the processor "
            f"{sum(begun.values()):.1f} s; then idle: "
            f"{idle_ray(processes, 10):.3f} s of the processor a second",
            flush=True,
        )
        for _ in range(options.repeat):
            for workers in (0, *map(int, options.workers.split(","))):
                for count in counts:
                    some = names[:count]
                    cost = (
                        run_on_ray(some, folder / "run", workers, processes) if workers
                        else run_plainly(some, folder / "plain.jsonl")
                    )  # fmt: skip
                    found.setdefault((workers, count), []).append(cost)
                    print(cost, flush=True)
        ray.shutdown()
    print(as_tables([median(costs) for costs in found.values()]))
    spread = max(
        statistics.pstdev(each.per_picture for each in costs) / median(costs).per_picture
        for costs in found.values()
    )
    print(f"largest standard deviation of a row, of its median: {100 * spread:.0f} %")
    if options.json:
        every = [asdict(cost) for costs in found.values() for cost in costs]
        options.json.write_text(json.dumps(every, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
