"""The launch of Triton's kernels: on the device that has their tensors, and behind each other.

Owns   where a kernel is launched, and how one begins before the one ahead of it has ended
       (programmatic dependent launch, from capability 9.0 on): its programs start in the room that
       the last programs of the other leave, fetch what no kernel writes, and wait.
Takes  a device. A kernel with OVERLAPS calls `wait_for_last` before it reads or writes anything.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

OVERLAP_VARIABLE = "MINIGPT4_OVERLAP"  # off: launch kernels one by one.
_FROM_CAPABILITY = (9, 0)
# Older drivers cannot keep such launches in a graph.
_FROM_DRIVER = 12030


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch there: Triton launches on the current device, wherever the tensors are."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def overlapping(device: torch.device) -> dict[str, bool]:
    """What a kernel with OVERLAPS is launched with."""
    if can_overlap(device):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels may begin early there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if os.environ.get(OVERLAP_VARIABLE) == "off":
        return False
    # Torch has no other way to it, and only builds for CUDA have this one.
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # noqa: SLF001
    return driver >= _FROM_DRIVER and torch.cuda.get_device_capability(device) >= _FROM_CAPABILITY


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_last(OVERLAPS: tl.constexpr) -> None:
    """Let the next kernel begin, and wait until all before this one have ended.

    The one ahead has waited for its own in the same way, so none can be left.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def fetch_ahead(
    rows: tl.tensor,
    row_bytes: tl.tensor,
    num_rows: tl.tensor,
    FETCHED: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Bring the first FETCHED bytes of rows into the GPU's cache: of a weight, only read here."""
    if OVERLAPS:
        # What is fetched begins and ends at multiples of 16 bytes, and is not empty.
        num_bytes = tl.minimum(row_bytes, FETCHED) // 16 * 16
        # A thread for each row. They are dealt out to warps: a warp's are asked for one by one.
        tl.inline_asm_elementwise(
            """{
                .reg .pred is_row; .reg .u32 lane, warp, warps, row; .reg .u64 at;
                mov.u32 warp, %tid.x;
                and.b32 lane, warp, 31;
                shr.u32 warp, warp, 5;
                mov.u32 warps, %ntid.x;
                shr.u32 warps, warps, 5;
                mad.lo.u32 row, lane, warps, warp;
                setp.lt.s32 is_row, row, $3;
                mad.wide.u32 at, row, $2, $1;
                and.b64 at, at, -16;
                @is_row cp.async.bulk.prefetch.L2.global [at], $4;
                mov.u32 $0, 0;
            }""",
            "=r,l,r,r,r",
            [rows, row_bytes, tl.where(num_bytes > 0, num_rows, 0), num_bytes],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
