"""Results and timing, shared by all parts of benchmarks/gpu.py.

Owns   a part's JSON file, the handling of failed measurements, and the timing of device work.
Takes  a part's name and measurements as functions.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minigpt4_runtime.report.files import write_whole


class UnavailableError(Exception):
    """This machine cannot do a measurement. That is an outcome, not a failure."""


@dataclass(frozen=True)
class Setting:
    """The device and the shapes. A dry run has tiny shapes on a CPU, and runs the same code."""

    is_dry: bool
    checkout: Path = Path(__file__).parents[1]

    @property
    def device(self) -> torch.device:
        """The first GPU; in a dry run the CPU."""
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Results:
    """The results of one part; the file is complete after each result."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.num_errors = 0
        self._path = path
        self._found: list[dict[str, Any]] = []

    def add(self, name: str, **values: object) -> None:
        """Keep a result, which replaces one of the same name."""
        self._found = [each for each in self._found if each["name"] != name]
        self._found.append({"name": name, **values})
        write_whole(self._path, json.dumps(self._found, indent=1) + "\n")
        print(f"{name}: {json.dumps(values)[:300]}", flush=True)

    def attempt(self, name: str, measure: Callable[[], Mapping[str, object]]) -> None:
        """Keep the result of `measure`, or its error."""
        try:
            values = measure()
        except UnavailableError as reason:
            values = {"unavailable": str(reason)}
        except Exception as error:  # noqa: BLE001 - later measurements must still run.
            traceback.print_exc()
            self.num_errors += 1
            values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.add(name, **values)


def median_seconds(
    compute: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 3
) -> float:
    """The median time of one computation, on CUDA by the GPU's own clock."""
    for _ in range(warm_up):
        compute()
    if device.type != "cuda":
        return statistics.median(_clocked(compute) for _ in range(repeats))
    marks: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(repeats + 1)
    ]
    marks[0].record()
    for mark in marks[1:]:
        compute()
        mark.record()
    torch.cuda.synchronize(device)
    times: list[float] = [a.elapsed_time(b) for a, b in pairwise(marks)]  # In milliseconds.
    return statistics.median(times) / 1e3


def as_graph(work: Callable[[], object], setting: Setting) -> Callable[[], object]:
    """The same as a CUDA graph, for work that is shorter than its launches by Python."""
    if setting.device.type != "cuda":
        return work
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())  # Warm-up that a capture needs.
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def one_by_one() -> Iterator[None]:
    """Launch each kernel when the one before has ended, where they would overlap."""
    from minigpt4_runtime.kernels import launching

    # At each launch it is called: a mock takes longer than a function.
    with mock.patch.object(launching, "can_overlap", lambda _: False):  # noqa: PT008
        yield


def _clocked(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started
