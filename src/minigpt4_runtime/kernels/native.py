"""The CPU kernels in C++: a distribution of its own, which may be absent.

Owns   whether it is there, what is lost without it, and the products that it computes.
Takes  rows and the parts of a weight; gives rows.
Never  copies a weight: its bytes are read as they lie in the mapped file.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.formats.contracts import LinearKernel

INSTALL = "pip install ./kernels (in a checkout)"
_MODULE = "minigpt4_kernels"


@cache
def find() -> tuple[ModuleType | None, str]:
    """The package that holds the kernels, or None and a sentence that says what is lost."""
    try:
        return importlib.import_module(_MODULE), ""
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        reason = "are not installed"
    except OSError as error:
        reason = f"cannot be loaded by torch {torch.__version__} ({error})"
    return None, (
        f"The CPU kernels {reason}: quantised weights are multiplied by plain torch, many times "
        f"more slowly. Run: {INSTALL}"
    )


def require() -> ModuleType:
    """The package that holds the kernels.

    Raises:
        BackendUnavailableError: it is not installed, or not for this torch.
    """
    module, lost = find()
    if module is None:
        raise BackendUnavailableError(lost)
    return module


def prepare_w8a16(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 8-bit weights; the rows keep 16 bits. None without the kernels."""
    return _kernel("linear_int8", _INT8, rounds_rows=False)


def prepare_w8a8(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 8-bit weights and rows rounded to 8 bits. None without the kernels."""
    return _kernel("linear_int8", _INT8, rounds_rows=True)


def prepare_w4a16(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 4-bit weights; the rows keep 16 bits. None without the kernels."""
    return _kernel("linear_int4", _INT4, rounds_rows=False)


def prepare_w4a8(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 4-bit weights and rows rounded to 8 bits. None without the kernels."""
    return _kernel("linear_int4", _INT4, rounds_rows=True)


def prepare_w8a16_sparse24(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 2:4 sparse 8-bit weights; the rows keep 16 bits. None without the kernels."""
    return _kernel("linear_sparse24_int8", _SPARSE24, rounds_rows=False)


def prepare_w8a8_sparse24(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """The same, with rows rounded to 8 bits."""
    return _kernel("linear_sparse24_int8", _SPARSE24, rounds_rows=True)


# The parts that an operator takes, in its order; None is passed for one that a weight lacks.
_INT8 = ("weight", "weight_scale", "weight_zero_point")
_INT4 = ("weight_packed", "weight_scale", "weight_zero_point")
_SPARSE24 = ("weight_values", "weight_positions", "weight_scale")


@cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning(find()[1])


def _kernel(name: str, part_names: tuple[str, ...], *, rounds_rows: bool) -> LinearKernel | None:
    if find()[0] is None:
        _warn_once()
        return None
    operator = getattr(torch.ops.minigpt4_kernels, name).default

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        product: Tensor = operator(flat, *map(parts.get, part_names), bias, rounds_rows)
        return product.view(*rows.shape[:-1], product.shape[-1])

    return multiply
