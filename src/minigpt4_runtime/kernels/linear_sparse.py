"""Products of many rows with 2:4 sparse matrices by tensor cores that skip what is not kept.

Owns   torch's semi-structured product (cuSPARSELt), and the measurement that says whether it is
       faster here than the plain one.
Takes  rows and a widened matrix, of which two of every four neighbours are 0; gives their product.
Never  keeps a compressed matrix: it would take as much memory again as the weight itself.

Checked with stand-ins for torch's two operators: it has not run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

_CAPABILITY = (8, 0)
# What cuSPARSELt asks of the sizes of a matrix of bytes and of rows; of halves it asks less.
_STEP, _ROW_STEP = 32, 16
_MEASURED_ROWS = (512, 2048)
_REPEATS = 5
# Less is not worth another kernel.
_GAIN = 0.95

logger = logging.getLogger(__name__)


@cache
def least_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int | None:
    """From how many rows on `multiply_sparse` is faster with such matrices; None: never.

    Measured on the device, with the compression of the matrix, once for each shape; not while a
    graph is captured. A product that is not the plain one is never taken. `dtype` is int8, or
    stands for any floats of 16 bits.
    """
    is_odd = any(size % _STEP for size in shape)
    if is_odd or not torch.backends.cusparselt.is_available() or not _has_sparse_cores(device):
        return None
    try:
        matrix = _few_whole(shape, dtype, device)
        matrix.view(-1, 4)[:, 2:] = 0
        for count in _MEASURED_ROWS:
            rows = _few_whole((count, shape[1]), dtype, device)
            if not torch.equal(multiply_sparse(rows, matrix), multiply_plain(rows, matrix)):
                logger.warning("torch's 2:4 sparse product is wrong here: the plain one is taken.")
                return None
            plain = seconds_of(partial(multiply_plain, rows, matrix), device)
            sparse = seconds_of(partial(multiply_sparse, rows, matrix), device)
            if sparse < _GAIN * plain:
                return count
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        logger.info("2:4 sparse products are made by the plain ones, as torch's failed: %s", why)
    return None


def _few_whole(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers of -1, 0 and 1: their sums are exact in every dtype, in any order."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randint(-1, 2, shape, dtype=torch.int8, device=device, generator=generator)
    return drawn.to(dtype)


def multiply_sparse(rows: Tensor, matrix: Tensor) -> Tensor:
    """(M, K) and (N, K) of one dtype → (M, N): floats in it, whole numbers as int32."""
    num_rows = len(rows)
    filled = functional.pad(rows, (0, 0, 0, -num_rows % _ROW_STEP))
    out_dtype = torch.int32 if rows.dtype is torch.int8 else None
    # torch has these two without a public name; its sparse tensors are made of them.
    kept = torch._cslt_compress(matrix)  # noqa: SLF001
    product: Tensor = torch._cslt_sparse_mm(  # noqa: SLF001
        kept, filled.T, out_dtype=out_dtype, transpose_result=True
    )
    return product[:num_rows]


def multiply_plain(rows: Tensor, matrix: Tensor) -> Tensor:
    """The same, whatever the matrix is."""
    if rows.dtype is torch.int8:
        return torch._int_mm(rows, matrix.T)  # noqa: SLF001 - torch has no public name for it.
    return functional.linear(rows, matrix)


def _has_sparse_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The time of a work on a GPU, which is waited for."""
    with torch.cuda.device(device):
        work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(_REPEATS):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / _REPEATS
