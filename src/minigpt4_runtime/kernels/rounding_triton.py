"""Rows of 8 bits on CUDA, by Triton.

Owns   the rounding of rows, and the scaling of what whole numbers sum up to.
Takes  rows (M, K) of floats, or sums (M, N) and their scales.
Never  asks the GPU for anything, so that a step can be captured as a graph.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4_runtime.kernels.launching import on_device_of, overlapping, wait_for_last
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

_SCALED_AT_ONCE = 1024


def round_rows(rows: Tensor, group_size: int | None) -> Tensor:
    """(M, K) floats → the same, rounded to 255 steps in each group of a row."""
    rounded = torch.empty_like(rows)
    _launch_rounding(rows, rounded, None, group_size)
    return rounded


def round_to_int8(rows: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """(M, K) floats → int8, and the scale of each group of each row, (M, groups) float32."""
    rounded = torch.empty_like(rows, dtype=torch.int8)
    num_groups = rows.shape[1] // group_size if group_size else 1
    scales = rows.new_empty(len(rows), num_groups, dtype=torch.float32)
    _launch_rounding(rows, rounded, scales, group_size)
    return rounded, scales


def round_to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) floats → float8_e4m3fn, and the scale of each row, (M, 1) float32."""
    rounded = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = rows.new_empty(len(rows), 1, dtype=torch.float32)
    _launch_rounding(rows, rounded, scales, None)
    return rounded, scales


def _launch_rounding(
    rows: Tensor, rounded: Tensor, scales: Tensor | None, group_size: int | None
) -> None:
    num_rows, width = rows.shape
    with on_device_of(rows):
        _round_rows[(num_rows,)](
            rows, rounded, scales, width, **rounding_sizes(width, group_size),
            **overlapping(rows.device),
        )  # fmt: skip


def rounding_sizes(width: int, group_size: int | None) -> dict[str, int]:
    """A program has a whole row."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": block, "GROUP": group_size or block, "num_warps": 8 if block > 4096 else 4}


def scale_sums(
    sums: Tensor, row_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sums (M, N), int32 or float32 → sums · scale of the row · scale of the output + bias."""
    product = torch.empty_like(sums, dtype=dtype)
    num_rows, num_outputs = sums.shape
    with on_device_of(sums):
        _scale_sums[(num_rows, triton.cdiv(num_outputs, _SCALED_AT_ONCE))](
            sums, row_scales, scales, bias, product, num_outputs, OUTPUTS=_SCALED_AT_ONCE
        )
    return product


@triton.jit  # type: ignore[untyped-decorator]
def sizes_of(numbers: tl.tensor) -> tl.tensor:
    """How large numbers are. NaN is infinite here: a maximum would pass over it."""
    return tl.where(numbers == numbers, tl.abs(numbers), float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def scale_of(largest: tl.tensor, IS_FLOAT: tl.constexpr) -> tl.tensor:
    """What a step of numbers up to `largest` is; one that is not finite makes all of them so."""
    return tl.maximum(largest, 1e-30) / (448 if IS_FLOAT else 127)


@triton.jit  # type: ignore[untyped-decorator]
def steps_of(numbers: tl.tensor, scale: tl.tensor, IS_FLOAT: tl.constexpr) -> tl.tensor:
    """Numbers as steps: whole ones from -127 to 127, or those that 8-bit floats will round."""
    found = numbers / scale
    if IS_FLOAT:  # What is a little larger would become NaN.
        found = tl.minimum(tl.maximum(found, -448.0), 448.0)
    else:
        # Next to 1.5 · 2**23 floats are whole numbers; additions round to the nearest even one.
        found = (found + 12582912.0) - 12582912.0
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _round_rows(  # noqa: PLR0917
    rows: tl.tensor,  # (M, width)
    rounded: tl.tensor,  # Likewise: floats, or 8 bits where the scales are kept.
    scales: tl.tensor,  # (M, groups), or None.
    width: tl.tensor,
    WIDTH: tl.constexpr,  # The power of two that holds a row.
    GROUP: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_last(OVERLAPS)
    columns = tl.arange(0, WIDTH)
    is_there = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    row = tl.load(rows + at, is_there, 0.0).to(tl.float32)
    groups = tl.reshape(row, (WIDTH // GROUP, GROUP))
    IS_FLOAT: tl.constexpr = rounded.dtype.element_ty == tl.float8e4nv
    scale = scale_of(tl.max(sizes_of(groups), 1, keep_dims=True), IS_FLOAT)
    found = steps_of(groups, scale, IS_FLOAT)
    if scales is None:
        found *= scale
    else:
        group, num_groups = tl.arange(0, WIDTH // GROUP), tl.cdiv(width, GROUP)
        at_group = tl.program_id(0) * num_groups + group
        tl.store(scales + at_group, tl.reshape(scale, (WIDTH // GROUP,)), group < num_groups)
    found = tl.reshape(found, (WIDTH,)).to(rounded.dtype.element_ty)
    tl.store(rounded + at, found, is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_sums(  # noqa: PLR0917
    sums: tl.tensor,  # (M, num_outputs) int32 or float32
    row_scales: tl.tensor,  # (M, 1)
    scales: tl.tensor,  # (num_outputs,)
    bias: tl.tensor,  # Likewise, or None.
    product: tl.tensor,  # (M, num_outputs)
    num_outputs: tl.tensor,
    OUTPUTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_outputs
    at = row * num_outputs + outputs
    found = tl.load(sums + at, is_output, 0).to(tl.float32) * tl.load(row_scales + row)
    found *= tl.load(scales + outputs, is_output, 0.0)
    if bias is not None:
        found += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)
    tl.store(product + at, found.to(product.dtype.element_ty), is_output)
