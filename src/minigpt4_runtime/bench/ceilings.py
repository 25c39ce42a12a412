"""The machine's limits, which every other speed is compared with.

Owns   the measurement of memory bandwidth and of matrix products on this machine.
Takes  a device and a dtype by torch's names.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PRODUCT_SIDE = 4096
SUMMED_BYTES = 2**30
_MOST_TRIES = 6
_ENOUGH_SECONDS = 4.0  # Some CPUs take ten for a product in half precision.
# On an accelerator, launching a product and reading its result takes longer than the product.
_IN_A_ROW = 20


@dataclass(frozen=True)
class Ceilings:
    """The best of a few tries."""

    gigabytes_per_second: float
    gigaflops_per_second: float


@cache
def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Sum a buffer far larger than the caches, and multiply matrices in float32 and in `dtype`.

    The faster of the two products counts, because a CPU may widen weights. Results are cached.
    """
    # A thread that computes keeps its own OpenMP threads, which would slow later measurements:
    # this one ends with the measurement.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_measure, torch.device(device), getattr(torch, dtype)).result()


def _measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    buffer = torch.ones(SUMMED_BYTES // 4, device=device)
    read_seconds = _best_seconds(buffer.sum, device)
    del buffer
    product_seconds = min(_product_seconds(device, each) for each in {torch.float32, dtype})
    return Ceilings(SUMMED_BYTES / read_seconds / 1e9, 2 * PRODUCT_SIDE**3 / product_seconds / 1e9)


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    left, right = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE, device=device).to(dtype)
    # Transposed, as a Linear multiplies by its weight.
    return _best_seconds(lambda: left @ right.T, device)


def _best_seconds(compute: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest time of a computation, including the read of its first number."""
    times: list[float] = []
    in_a_row = 1 if device.type == "cpu" else _IN_A_ROW
    while len(times) < _MOST_TRIES and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        for _ in range(in_a_row):
            result = compute()
        result.flatten()[0].item()
        times.append(time.perf_counter() - started)
    return min(times) / in_a_row
