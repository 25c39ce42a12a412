"""The CPU kernels in C++: a distribution of its own, which may be absent.

Owns   whether it is there, what is lost without it, and the products that it computes.
Takes  rows and the parts of a weight; gives rows.
Never  copies a weight: its bytes are read as they lie in the mapped file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel

INSTALL = "pip install minigpt4-runtime-kernels"
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


def prepare_w8a16(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 8-bit weights; the rows keep 16 bits. None without the kernels."""
    return _multiply_int8(rounds_rows=False)


def prepare_w8a8(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 8-bit weights and rows rounded to 8 bits. None without the kernels."""
    return _multiply_int8(rounds_rows=True)


def prepare_w4a16(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 4-bit weights; the rows keep 16 bits. None without the kernels."""
    return _multiply_int4(rounds_rows=False)


def prepare_w4a8(widen_from: int | None) -> LinearKernel | None:  # noqa: ARG001
    """Products with 4-bit weights and rows rounded to 8 bits. None without the kernels."""
    return _multiply_int4(rounds_rows=True)


def _multiply_int8(*, rounds_rows: bool) -> LinearKernel | None:
    if find()[0] is None:
        return None
    operator = torch.ops.minigpt4_kernels.linear_int8.default

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        weight, scale = parts["weight"], parts["weight_scale"]
        zero_point = parts.get("weight_zero_point")
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        product: Tensor = operator(flat, weight, scale, zero_point, bias, rounds_rows)
        return product.view(*rows.shape[:-1], len(weight))

    return multiply


def _multiply_int4(*, rounds_rows: bool) -> LinearKernel | None:
    if find()[0] is None:
        return None
    operator = torch.ops.minigpt4_kernels.linear_int4.default

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        zero_point = parts.get("weight_zero_point")
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        product: Tensor = operator(flat, packed, scale, zero_point, bias, rounds_rows)
        return product.view(*rows.shape[:-1], len(packed))

    return multiply
