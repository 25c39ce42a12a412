"""What lies between the products of the towers on CUDA, by Triton.

Owns   the kernels, one launch each. Takes rows; gives rows.
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

_GATED_AT_ONCE = 1024
_NUMBERS_PER_WARP = 1024


class TritonOperations:
    """See `RowOperations`. Sums and products are rounded where torch rounds them."""

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        return _launch_norm(hidden, added, weight, None, eps)

    def add_and_layer_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        return _launch_norm(hidden, added, weight, bias, eps)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `RowOperations`."""
        width = gate.shape[-1]
        product = gate.new_empty(gate.shape)
        # Of one product, rows lie further apart than they are long.
        gate, up = (each.reshape(-1, width) for each in (gate, up))
        gate, up = (each if each.stride(1) == 1 else each.contiguous() for each in (gate, up))
        with on_device_of(gate):
            _gate[(len(gate), triton.cdiv(width, _GATED_AT_ONCE))](
                gate, up, product, width, gate.stride(0), up.stride(0), NUMBERS=_GATED_AT_ONCE,
                **overlapping(gate.device),
            )  # fmt: skip
        return product


def _launch_norm(
    hidden: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = hidden.contiguous()
    total = hidden if added is None else added.contiguous()
    normed, width = torch.empty_like(hidden), hidden.shape[-1]
    with on_device_of(hidden):
        _add_and_norm[(hidden.numel() // width,)](
            hidden, None if added is None else total, weight, bias, normed, width, eps,
            **norm_sizes(width), **overlapping(hidden.device),
        )  # fmt: skip
    return total, normed


def norm_sizes(width: int) -> dict[str, int]:
    """What the kernel is compiled for: a program has a whole row."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": block, "num_warps": min(16, max(1, block // _NUMBERS_PER_WARP))}


@triton.jit  # type: ignore[untyped-decorator]
def _add_and_norm(  # noqa: PLR0913, PLR0917
    hidden: tl.tensor,  # (T, width)
    added: tl.tensor,  # Likewise, or None. The sum takes its place.
    weight: tl.tensor,  # (width,)
    bias: tl.tensor,  # Likewise, or None: then the mean stays too.
    normed: tl.tensor,  # (T, width)
    width: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,  # The power of two that holds a row.
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_last(OVERLAPS)
    columns = tl.arange(0, WIDTH)
    is_there = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    rows = tl.load(hidden + at, is_there, 0.0)
    if added is not None:
        more = tl.load(added + at, is_there, 0.0).to(tl.float32)
        rows = (rows.to(tl.float32) + more).to(rows.dtype)
        tl.store(added + at, rows, is_there)
    wide = rows.to(tl.float32)
    if bias is not None:
        wide = tl.where(is_there, wide - tl.sum(wide, 0) / width, 0.0)
    unit = wide * (1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps))
    if bias is None:
        unit = unit.to(rows.dtype).to(tl.float32)
    result = unit * tl.load(weight + columns, is_there, 0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + columns, is_there, 0.0).to(tl.float32)
    tl.store(normed + at, result.to(rows.dtype), is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # noqa: PLR0917
    gate: tl.tensor,  # (T, width)
    up: tl.tensor,
    product: tl.tensor,  # Likewise, without gaps.
    width: tl.tensor,
    gate_step: tl.tensor,  # From one row to the next.
    up_step: tl.tensor,
    NUMBERS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    is_there = columns < width
    wide = tl.load(gate + row * gate_step + columns, is_there, 0.0).to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(up.dtype.element_ty).to(tl.float32)
    gated = silu * tl.load(up + row * up_step + columns, is_there, 0.0).to(tl.float32)
    tl.store(product + row * width + columns, gated.to(up.dtype.element_ty), is_there)
