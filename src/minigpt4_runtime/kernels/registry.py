"""Names → attention kernels, as a table of "module:attribute".

Owns   which names exist. Never imports a kernel before it is chosen.
"""

from pkgutil import resolve_name
from typing import cast

from minigpt4_runtime.kernels.contracts import AttentionKernel

ATTENTION_KERNELS = {
    "reference": "minigpt4_runtime.kernels.attention_reference:prepare",
    "sdpa": "minigpt4_runtime.kernels.attention_sdpa:prepare",
    "triton": "minigpt4_runtime.kernels.attention_triton:prepare",
    "npu": "minigpt4_runtime.kernels.attention_npu:prepare",
}


def attention_kernel(name: str) -> AttentionKernel:
    """The kernel of that name in ATTENTION_KERNELS."""
    return cast(AttentionKernel, resolve_name(ATTENTION_KERNELS[name]))
