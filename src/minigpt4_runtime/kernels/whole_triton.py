"""Products of 8-bit rows with 8-bit weights as whole numbers, many rows at once, by Triton.

Owns   the kernel for weights with a scale for each group of inputs, and for sizes that torch's own
       product of whole numbers does not take.
Takes  int8 rows (M, K) with their scales, and an int8 matrix (N, K); gives floats (M, N).
Never  asks the GPU for anything.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4_runtime.kernels.launching import on_device_of
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

# Of rows and of outputs: sums of both kinds then take half of a multiprocessor's registers.
_SIDE = 128
_WITHOUT_GROUPS = 64


def multiply_whole(  # noqa: PLR0917 - rows and a weight, each with its scales.
    rows: Tensor,
    row_scales: Tensor,
    matrix: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Sums of whole numbers, times the scales of row and output, plus the bias.

    `row_scales` are (M, groups), and `scales` (N, groups) of as many groups. Each group's sum is
    exact; groups are added up in float32.
    """
    (num_rows, num_inputs), num_outputs = rows.shape, len(matrix)
    product = torch.empty(num_rows, num_outputs, dtype=dtype, device=rows.device)
    num_groups = scales.shape[1]
    sizes = whole_sizes(None if num_groups == 1 else num_inputs // num_groups)
    grid = (triton.cdiv(num_rows, _SIDE), triton.cdiv(num_outputs, _SIDE))
    with on_device_of(rows):
        _multiply_whole[grid](
            rows, row_scales, matrix, scales, bias, product,
            num_rows, num_outputs, num_inputs, **sizes,
        )  # fmt: skip
    return product


def whole_sizes(group_size: int | None) -> dict[str, int | bool]:
    """The tile of a program. All its tiles in flight take less than 99 KiB of shared memory."""
    inputs = group_size or _WITHOUT_GROUPS
    return {
        "HAS_GROUPS": group_size is not None, "SIDE": _SIDE, "INPUTS": inputs,
        "num_warps": 8, "num_stages": 4 if inputs <= 64 else 3,
    }  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(
    whole: tl.tensor,  # (SIDE, SIDE) int32
    row_scales: tl.tensor,  # (SIDE,): where they are.
    scales: tl.tensor,
    is_row: tl.tensor,
    is_output: tl.tensor,
) -> tl.tensor:
    """A group's sums as float32."""
    of_rows = tl.load(row_scales, is_row, 0.0)
    of_outputs = tl.load(scales, is_output, 0.0).to(tl.float32)
    return whole.to(tl.float32) * of_rows[:, None] * of_outputs[None, :]


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _multiply_whole(  # noqa: PLR0913, PLR0917
    rows: tl.tensor,  # (M, K) int8
    row_scales: tl.tensor,  # (M, groups)
    matrix: tl.tensor,  # (N, K) int8
    scales: tl.tensor,  # (N, groups)
    bias: tl.tensor,  # (N,) or None
    product: tl.tensor,  # (M, N)
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    HAS_GROUPS: tl.constexpr,
    SIDE: tl.constexpr,
    INPUTS: tl.constexpr,  # The size of a group, if there are any.
) -> None:
    """One program: SIDE rows, SIDE outputs, all inputs."""
    own_rows = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    outputs = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    is_row, is_output = own_rows < num_rows, outputs < num_outputs
    num_groups = num_inputs // INPUTS if HAS_GROUPS else 1
    total = tl.zeros((SIDE, SIDE), tl.float32)
    whole = tl.zeros((SIDE, SIDE), tl.int32)
    for step in range(0, tl.cdiv(num_inputs, INPUTS)):
        inputs = step * INPUTS + tl.arange(0, INPUTS)
        is_input = inputs < num_inputs
        left = tl.load(
            rows + own_rows[:, None] * num_inputs + inputs[None, :],
            is_row[:, None] & is_input[None, :], 0,
        )  # fmt: skip
        right = tl.load(
            matrix + outputs[None, :] * num_inputs + inputs[:, None],
            is_input[:, None] & is_output[None, :], 0,
        )  # fmt: skip
        whole = tl.dot(left, right, whole, out_dtype=tl.int32)
        if HAS_GROUPS:
            at_rows, at_outputs = own_rows * num_groups + step, outputs * num_groups + step
            total += _scaled(whole, row_scales + at_rows, scales + at_outputs, is_row, is_output)
            whole = tl.zeros((SIDE, SIDE), tl.int32)
    if not HAS_GROUPS:
        total = _scaled(whole, row_scales + own_rows, scales + outputs, is_row, is_output)
    if bias is not None:
        total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[None, :]
    at = own_rows[:, None] * num_outputs + outputs[None, :]
    found = total.to(product.dtype.element_ty)
    tl.store(product + at, found, is_row[:, None] & is_output[None, :])
