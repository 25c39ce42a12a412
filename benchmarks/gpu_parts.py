"""One part of benchmarks/gpu.py, which starts this file as a process of its own.

python benchmarks/gpu_parts.py PART --out DIR [--dry-run]

Owns   the parts for facts and for correctness: facts, kernels, attention, answers, server.
       gpu_speed.py, gpu_products.py, gpu_whole.py and gpu_tuning.py have the parts for speed and
       memory.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_results import (
    Results,
    Setting,
    UnavailableError,
    as_graph,
    median_seconds,
    one_by_one,
)

from minigpt4_runtime.config import DTypeName

# Most tests of kernels compile one or two of them, which takes a processor a second each.
MOST_WORKERS = 16
# What these warn of is slower, or another way to the same: no error tells it.
WARNING = ("engine.graphs", "vision.torch", "kernels.linear_sparse")
HERE = "facts", "kernels", "attention", "answers", "server"
ELSEWHERE = {
    "products": "gpu_products", "quantised": "gpu_whole", "start": "gpu_whole",
    "tuning": "gpu_tuning",
}  # fmt: skip
PARTS = (
    *HERE, *ELSEWHERE, "language", "fallback", "vision", "picture", "profile", "compiled", "rival",
)  # fmt: skip


def find_part(name: str) -> Callable[[Setting, Results], None]:
    """A part's code, loaded without the other parts' imports."""
    elsewhere = ELSEWHERE.get(name, "gpu_speed")
    module = sys.modules[__name__] if name in HERE else importlib.import_module(elsewhere)
    return getattr(module, name)  # type: ignore[no-any-return]


# --- facts ----------------------------------------------------------------------------------------


def facts(setting: Setting, results: Results) -> None:
    """The card, whether it launches and replays, and the ceilings that rates are compared with."""
    results.attempt("machine", partial(machine, setting.device))
    results.attempt("first launch", partial(first_launch, setting))
    results.attempt("graphs", partial(replayed, setting))
    results.attempt("overlap", partial(overlapped, setting))
    results.attempt("copy", partial(copy_rate, setting))
    for dtype in ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"):
        results.attempt(dtype, partial(product_rate, setting, dtype))
    for uses_cudnn in (True, False):
        name = f"attention over new lengths, {'with' if uses_cudnn else 'without'} cuDNN"
        results.attempt(name, partial(new_lengths, setting, uses_cudnn=uses_cudnn))


def machine(device: torch.device) -> dict[str, Any]:
    """The facts that a reader needs before comparing two numbers."""
    from minigpt4_runtime.bench.machine import machine_facts
    from minigpt4_runtime.devices.registry import open_device

    values: dict[str, Any] = machine_facts(str(device))
    values["attention"] = open_device(str(device)).facts.attention[0]
    # Without these two Triton cannot launch, and attention is torch's.
    values["compiler"] = shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    values["python_headers"] = headers.is_file()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        values |= {
            "card": card.name, "capability": f"{card.major}.{card.minor}",
            "gpu_memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size, "cuda": torch.version.cuda, "driver": driver_version(),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }  # fmt: skip
    return values


def driver_version() -> str:
    """The driver's version from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.splitlines()[0].strip()


def first_launch(setting: Setting) -> dict[str, float]:
    """The seconds until our first kernel has given its result: it is compiled first."""
    from minigpt4_runtime.kernels.registry import row_operations
    from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS

    rows = torch.randn(2, 4096, device=setting.device)
    weight = torch.ones(4096, device=setting.device)
    started = time.perf_counter()
    operations = row_operations(setting.device)
    if setting.device.type == "cuda" and operations is TORCH_OPERATIONS:
        raise UnavailableError(
            "Triton does not run here: it needs a compute capability of 8.0, gcc or clang, and "
            "Python's headers. All parts measure torch's own operations"
        )
    found, wanted = (
        each.add_and_norm(rows, None, weight, 1e-5)[1] for each in (operations, TORCH_OPERATIONS)
    )
    difference = float((found - wanted).abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f"a norm by Triton differs by {difference:g} from torch's")
    return {"seconds": time.perf_counter() - started}


def replayed(setting: Setting) -> dict[str, float]:
    """The milliseconds of a capture, once graphs are known to compute with other numbers."""
    from minigpt4_runtime.devices.registry import open_device

    capture = open_device(str(setting.device)).capture
    if capture is None:
        raise UnavailableError("CUDA graphs need a GPU")
    inputs = [torch.zeros(count, 64, device=setting.device) for count in (1, 3, 2)]
    started = time.perf_counter()
    with torch.inference_mode():  # As the engine captures; what is measured otherwise comes later.
        replays = [capture(partial(torch.exp, each)) for each in inputs[:2]]
    replays.append(capture(partial(torch.exp, inputs[2])))
    seconds = time.perf_counter() - started
    for number in (2, 0, 1, 1, 0, 2):
        wanted = inputs[number].normal_().exp()
        if not torch.equal(replays[number](), wanted):
            raise RuntimeError("a graph gave what it had been captured with")
    return {"milliseconds": seconds / len(inputs) * 1e3}


def overlapped(setting: Setting) -> dict[str, float]:
    """Milliseconds of a chain of our kernels that overlap, or not, once both are seen to agree."""
    if setting.device.type != "cuda":
        raise UnavailableError("kernels overlap on GPUs only")
    from minigpt4_runtime.kernels.registry import row_operations
    from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS

    operations = row_operations(setting.device)
    if operations is TORCH_OPERATIONS:
        raise UnavailableError("Triton does not run here")
    from minigpt4_runtime.kernels import launching, weight_triton
    from minigpt4_runtime.kernels.linear_triton import prepare_float

    if not launching.can_overlap(setting.device):
        raise UnavailableError("kernels overlap from capability 9.0 and CUDA 12.3 on")
    draw = partial(torch.randn, device=setting.device, dtype=torch.float16)
    weights, norm, multiply = draw(32, 4096, 4096) / 64, draw(4096), prepare_float(None)

    def compute() -> torch.Tensor:
        # Copied once: nothing begins before a copy has ended, nor a copy before a kernel has.
        hidden, added = first[0], first[1].clone()
        for weight in weights:
            hidden, normed = operations.add_and_norm(hidden, added, norm, 1e-5)
            added = multiply(normed, {"weight": weight}, None)
        found.copy_(hidden)
        return found

    first, found = draw(2, 1, 4096), draw(1, 4096)
    with one_by_one():
        apart = as_graph(compute, setting)
    with mock.patch.object(weight_triton, "_MOST_OF_ROW", 0):
        unfetched = as_graph(compute, setting)
    together = as_graph(compute, setting)
    for _ in range(100):
        first.normal_()
        apart()
        wanted = found.clone()
        together()
        if not torch.equal(found, wanted):
            raise RuntimeError("kernels that overlap compute something else")
    ways = {"overlapping": together, "one by one": apart, "fetching nothing ahead": unfetched}
    return {way: 1e3 * median_seconds(run, setting.device) for way, run in ways.items()}


def copy_rate(setting: Setting) -> dict[str, float]:
    """Bytes read and written by copying a buffer far larger than the caches."""
    num_bytes = 2**20 if setting.is_dry else 2**32
    source = torch.randint(255, (num_bytes,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), setting.device)
    return {"gigabytes_per_second": 2 * num_bytes / seconds / 1e9}


def product_rate(setting: Setting, dtype: str) -> dict[str, float]:
    """A large product of random matrices, the right one transposed as a weight is."""
    side = 64 if setting.is_dry else 8192
    left, right = torch.randn(2, side, side, device=setting.device)
    multiply = _multiplier(dtype, setting.device)
    one, other = (_cast(matrix, dtype) for matrix in (left, right))
    seconds = median_seconds(lambda: multiply(one, other.T), setting.device)
    return {"teraflops_per_second": 2 * side**3 / seconds / 1e12}


def _cast(matrix: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "int8":
        return (matrix * 40).clamp(-127, 127).to(torch.int8)
    return matrix.to(getattr(torch, dtype))


def _multiplier(
    dtype: str, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if dtype == "int8":
        return torch._int_mm  # noqa: SLF001 - torch has no public name for it.
    if dtype != "float8_e4m3fn":
        return torch.mm
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UnavailableError("fp8 products need a GPU of compute capability 8.9 or more")
    scale = torch.ones((), device=device)
    return lambda a, b: torch._scaled_mm(  # noqa: SLF001
        a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def new_lengths(setting: Setting, *, uses_cudnn: bool) -> dict[str, float]:
    """The host's work for each context length that is new."""
    attend = torch.nn.functional.scaled_dot_product_attention
    dtype = torch.float32 if setting.is_dry else torch.float16
    q, k = (torch.randn(1, 32, n, 128, device=setting.device).to(dtype) for n in (1, 400))
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
    try:
        attend(q, k, k)
        setting.synchronize()
        started = time.perf_counter()
        for length in range(300, 320):
            attend(q, k[:, :, :length], k[:, :, :length])
        setting.synchronize()
        return {"milliseconds": (time.perf_counter() - started) / 20 * 1e3}
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- kernels and answers --------------------------------------------------------------------------


def kernels(setting: Setting, results: Results) -> None:
    """`pytest -m gpu` of the kernels."""
    run_tests("pytest -m gpu tests/kernels", list(files_of_gpu_tests(setting, "kernels")), results)


def attention(setting: Setting, results: Results) -> None:
    """The speed of attention, of what it caches, and of the choice of ids."""
    import gpu_attention
    from gpu_whole import choices
    from gpu_writes import writes

    gpu_attention.attention(setting, results)
    writes(setting, results)
    choices(setting, results)


def answers(setting: Setting, results: Results) -> None:
    """The demo model's exact answers in half precision; then `pytest -m gpu` of all else."""
    dtypes: list[DTypeName] = ["float32"] if setting.is_dry else ["float16", "bfloat16"]
    for dtype in dtypes:
        results.attempt(f"demo {dtype}", partial(demo_answers, setting, dtype))
    kernel_tests = {*files_of_gpu_tests(setting, "kernels")}
    others = [path for path in files_of_gpu_tests(setting) if path not in kernel_tests]
    run_tests("pytest -m gpu, all other tests", others, results)


def files_of_gpu_tests(setting: Setting, *below: str) -> Iterator[Path]:
    """The test files with GPU tests: others may need packages that are not installed."""
    for path in sorted((setting.checkout / "tests").joinpath(*below).rglob("test_*.py")):
        if "mark.gpu" in path.read_text("utf-8"):
            yield path


def run_tests(name: str, paths: Sequence[Path], results: Results, *more: str) -> None:
    """Run tests in this process, with several workers if pytest-xdist is installed."""
    import pytest

    # Warnings of an old torch are not failures; pytest prints them into the log.
    options = ["-m", "gpu", "-W", "default", "-q", "--tb=short", "-p", "no:cacheprovider", *more]
    if importlib.util.find_spec("xdist") and torch.cuda.is_available():
        options += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    recorder = TestRecorder(name, results)
    status = pytest.main([*options, *map(str, paths)], plugins=[recorder])
    recorder.keep(status=int(status))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        results.num_errors += 1
        results.add(f"{name}: the run itself", error=f"pytest ended with {status!r}")


class TestRecorder:
    """A pytest plugin that writes the counts and each failure at once."""

    __test__ = False

    def __init__(self, name: str, results: Results) -> None:
        self._name, self._results = name, results
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once: by its call, or by a failed or skipped setup or teardown."""
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            if report.failed:
                self._fail(report.nodeid, str(report.longrepr))
            elif sum(self._counts.values()) % 50 == 0:
                self.keep()

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be collected is a failure."""
        if report.failed:
            self._counts["failed"] += 1
            self._fail(report.nodeid, str(report.longrepr))

    def _fail(self, test: str, text: str) -> None:
        errors = [line for line in text.splitlines() if line.startswith("E ")] or [text[-200:]]
        self._failures.append({"test": test, "why": errors[0][:300]})
        self._results.num_errors += 1
        self.keep()

    def keep(self, **values: object) -> None:
        """Write the results so far."""
        self._results.add(self._name, **self._counts, failures=self._failures, **values)


def demo_answers(setting: Setting, dtype: DTypeName) -> dict[str, Any]:
    """The counts of `minigpt4 evaluate demo` over several seeds."""
    from minigpt4_runtime import MiniGPT4
    from minigpt4_runtime.evaluation.demo_check import check

    seeds, num_scenes = (range(1), 1) if setting.is_dry else (range(8), 25)
    model = MiniGPT4.load(device=str(setting.device), dtype=dtype)
    with model, ThreadPoolExecutor(len(seeds)) as pool:
        reports = list(pool.map(lambda seed: check(model, num_scenes=num_scenes, seed=seed), seeds))
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for report in reports:
        for group, score in report.by_group().items():
            right[group] += score.num_right
            asked[group] += score.num_asked
    groups = {group: [right[group], asked[group]] for group in asked}
    return {"scenes": len(seeds) * num_scenes, "right_of_asked": groups}


# --- server ---------------------------------------------------------------------------------------


def server(setting: Setting, results: Results) -> None:
    """benchmarks/serve_load.py with 64 clients."""
    for package in ("fastapi", "uvicorn", "httpx"):
        if importlib.util.find_spec(package) is None:
            results.add("64 clients", unavailable=f"{package} is not installed")
            return
    from serve_load import run_round, serving

    clients, requests = (2, 4) if setting.is_dry else (64, 512)

    def measure() -> Mapping[str, object]:
        dtype = "float32" if setting.is_dry else "float16"
        options = ("--device", str(setting.device), "--dtype", dtype)
        with serving(*options, log=None) as (url, _):
            asyncio.run(run_round(url, clients, 2 * clients))  # Warms it up.
            done = asyncio.run(run_round(url, clients, requests))
        if done.errors:
            raise RuntimeError(f"{len(done.errors)} requests failed: {done.errors[0]}")
        return {
            "clients": clients, "requests": requests, "seconds": done.seconds,
            "tokens_per_second": done.tokens / done.seconds,
            "first_ms": percentiles(done.first), "token_ms": percentiles(done.per_token),
        }  # fmt: skip

    results.attempt(f"{clients} clients", measure)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    middle, late = times.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {"p50": middle, "p99": late}


@contextmanager
def warnings_kept(results: Results) -> Iterator[None]:
    """Let a warning that something goes on without its fast way count as an error of the part."""
    count = itertools.count(1)

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            results.num_errors += 1
            results.add(f"warning {next(count)}", error=record.getMessage())

    keeper, loggers = Keeper(), [logging.getLogger(f"minigpt4_runtime.{n}") for n in WARNING]
    for each in loggers:
        each.addHandler(keeper)
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(keeper)


def overlap_failed(folder: Path) -> bool:
    """Whether the part `facts` has run, and its kernels that overlap were wrong or never ended.

    Then the other parts measure kernels one by one.
    """
    path = folder / "facts.json"
    if importlib.util.find_spec("triton") is None or not path.exists():
        return False
    found = {each["name"]: each for each in json.loads(path.read_text("utf-8"))}
    return "error" in found.get("overlap", {"error": "none"})


def main() -> None:
    """Run one part; the exit status is 0 if all of it succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    setting, results = Setting(args.dry_run), Results(args.out / f"{args.part}.json")
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here. Try the script itself with --dry-run.")
    if args.part != "facts" and overlap_failed(args.out):
        os.environ["MINIGPT4_OVERLAP"] = "off"  # For what this process starts too.
    with warnings_kept(results):
        find_part(args.part)(setting, results)
    sys.exit(bool(results.num_errors))


if __name__ == "__main__":
    main()
