"""The most that a machine gives, to hold all else against.

Owns   how fast memory is read and large matrices are multiplied here, measured at once.
Takes  a device and a dtype as torch names them.
Never  measures a model.
"""

from __future__ import annotations

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
# An accelerator is done with one in less time than it takes to ask for it and to read a number.
_IN_A_ROW = 20


@dataclass(frozen=True)
class Ceilings:
    """The best of a few tries."""

    gigabytes_per_second: float
    gigaflops_per_second: float


@cache
def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Sum a buffer far larger than the caches, and multiply matrices in float32 and in `dtype`.

    The product counts in the faster of the two dtypes: a CPU may widen weights where that pays.
    A second call gives what the first has found.
    """
    # In a thread that ends with it: each that computes keeps OpenMP threads of its own, which
    # would get in the way of those that are measured next.
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
    # Transposed, as the weight of a Linear stands in its product.
    return _best_seconds(lambda: left @ right.T, device)


def _best_seconds(compute: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest time of a computation whose first number is then read, which waits for it."""
    times: list[float] = []
    in_a_row = 1 if device.type == "cpu" else _IN_A_ROW
    while len(times) < _MOST_TRIES and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        for _ in range(in_a_row):
            result = compute()
        result.flatten()[0].item()
        times.append(time.perf_counter() - started)
    return min(times) / in_a_row
