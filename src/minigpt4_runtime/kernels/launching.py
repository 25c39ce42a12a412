"""The launch of Triton's kernels: on the device that has their tensors, and behind each other.

Owns   where a kernel is launched, and how one begins before the one ahead of it has ended
       (programmatic dependent launch, from capability 9.0 on): its programs start in the room that
       the last programs of the other leave, fetch what no kernel writes, and wait.
Takes  a device. A kernel with OVERLAPS calls `wait_for_last` before it reads or writes anything.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

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

_FROM_CAPABILITY = (9, 0)
# Older drivers cannot keep such launches in a graph.
_FROM_DRIVER = 12030
# Of each row of a weight. Those that fit on a GPU at once then ask for 10 to 20 MB, which memory
# needs some microseconds for: as long as small kernels take.
_FETCHED_BYTES: tl.constexpr = tl.constexpr(4096)


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
    rows: tl.tensor, row_bytes: tl.tensor, num_rows: tl.tensor, OVERLAPS: tl.constexpr
) -> None:
    """Bring the first bytes of rows into the GPU's cache: of a weight, which nothing writes."""
    if OVERLAPS:
        # A thread for each row. What is fetched begins and ends at multiples of 16 bytes.
        tl.inline_asm_elementwise(
            """{
                .reg .pred is_row; .reg .u32 row; .reg .u64 at;
                mov.u32 row, %tid.x;
                setp.lt.s32 is_row, row, $3;
                mad.wide.u32 at, row, $2, $1;
                and.b64 at, at, -16;
                @is_row cp.async.bulk.prefetch.L2.global [at], $4;
                mov.u32 $0, 0;
            }""",
            "=r,l,r,r,r",
            [rows, row_bytes, num_rows, tl.minimum(row_bytes, _FETCHED_BYTES) // 16 * 16],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
