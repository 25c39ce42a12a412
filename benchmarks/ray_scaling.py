"""The cost of a picture on Ray, from few pictures to many, and as a ratio to a plain run.

python benchmarks/ray_scaling.py
python benchmarks/ray_scaling.py --counts 10,100,1000,10000 --workers 1,2 --json ray.json

Pictures are drawn for it, and the demo model describes each once, greedily. "plain" is
`MiniGPT4.describe_all` in this process with a record appended for each, as `minigpt4 describe` does
it; Ray's runs are those of `minigpt4 describe --ray`. A run is counted from the moment when a model
is loaded: neither Ray's start nor the loading is in it. cpu is the processor time of
all processes of a run, Ray's own included, and wall the time that passed, for a picture; both are
ratios to the plain run of the largest count. (Linux: processor times are read from /proc.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
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
from minigpt4_runtime.cluster.result_places import LocalPlace
from minigpt4_runtime.cluster.run import WorkerPlan, describe_names
from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice
from minigpt4_runtime.cluster.worker import Job
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.files import append_record
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

MARK = "RAY_SCALING_RUN"


@dataclass
class Cost:
    """Seconds for a picture, of the processors and of the clock; `workers` 0 is the plain run."""

    workers: int
    pictures: int
    cpu: float
    wall: float


class Clock:
    """Counts pictures from the first news, that a model is ready, to the last."""

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        self._cpu_seconds = cpu_seconds
        self._news: list[tuple[float, float, int]] = []

    def done(self, count: int) -> None:
        """So many more are done. Only the first news and the latest are kept."""
        total = count + (self._news[-1][2] if self._news else 0)
        self._news = [*self._news[:1], (time.perf_counter(), self._cpu_seconds(), total)]

    def cost(self, workers: int) -> Cost:
        """For each picture."""
        (wall, cpu, _), (wall_end, cpu_end, total) = self._news
        return Cost(workers, total, (cpu_end - cpu) / total, (wall_end - wall) / total)


def cpu_of_marked(mark: str) -> float:
    """The processor time of this process and of all that carry the mark, Ray's own included."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.name != str(os.getpid()) and (
                f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes()
            ):
                continue
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It has ended.
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def draw_pictures(folder: Path, count: int) -> list[str]:
    """Draw scenes, each another; give their paths."""
    rng = random.Random(1)
    paths = [folder / f"{number:06}.png" for number in range(count)]
    for path in paths:
        scenes.draw(scenes.random_scene(rng, held_out=True), rng, side=112).save(path)
    return list(map(str, paths))


def run_plainly(names: list[str], out: Path) -> Cost:
    """Describe in this process."""
    clock = Clock(time.process_time)
    with MiniGPT4.load() as model:
        clock.done(0)
        for described in model.describe_all(names):
            append_record(out, asdict(Record.of(names[described.index], described)))
            clock.done(1)
    return clock.cost(0)


def run_on_ray(names: list[str], out: Path, workers: int, mark: str) -> Cost:
    """Describe with so many workers."""
    folder = RunFolder.open(LocalPlace(out), names, {}, ShardChoice(), resume=False)
    job = Job(model={}, prompt=DESCRIBE_PROMPT, sampling=SamplingParams(), folder=Path("/"))
    clock = Clock(lambda: cpu_of_marked(mark))
    tally = describe_names(job, folder, WorkerPlan(num_workers=workers), on_done=clock.done)
    if tally.described != len(names):
        raise SystemExit(f"{tally.failed} pictures failed: {tally.failures[:1]}")
    return clock.cost(workers)


def as_table(costs: list[Cost]) -> str:
    """Ratios to the plain run of the largest count."""
    base = max((cost for cost in costs if not cost.workers), key=lambda cost: cost.pictures)
    lines = ["| run | pictures | cpu | wall |", "|---|---|---|---|"]
    for cost in costs:
        run = f"Ray, workers: {cost.workers}" if cost.workers else "plain"
        lines.append(
            f"| {run} | {cost.pictures} | {cost.cpu / base.cpu:.2f} | {cost.wall / base.wall:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every count plainly and with every number of workers, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", default="10,100,1000,10000")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = sorted(map(int, options.counts.split(",")))
    torch.set_num_threads(1)
    mark = os.environ[MARK] = uuid.uuid4().hex
    # Each process of Ray has one thread for products, and so has the plain run.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray: Any = require("ray", extra="ray")
    with tempfile.TemporaryDirectory(prefix="rayscaling") as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        names = draw_pictures(folder / "pictures", counts[-1])
        costs = [run_plainly(names[:count], folder / f"{count}.jsonl") for count in counts]
        ray.init(log_to_driver=False, logging_level="ERROR")
        for workers in map(int, options.workers.split(",")):
            for count in counts:
                costs.append(run_on_ray(names[:count], folder / "run", workers, mark))
                shutil.rmtree(folder / "run")
                print(costs[-1], flush=True)
        ray.shutdown()
    print(as_table(costs))
    if options.json:
        options.json.write_text(json.dumps(list(map(asdict, costs)), indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
