"""Names → attention kernels, as a table of "module:attribute".

Owns   which names exist. Never imports a kernel before it is chosen.
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import cast

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.kernels.contracts import AttentionKernel

ATTENTION_KERNELS = {
    "reference": "minigpt4_runtime.kernels.attention_reference:ReferenceAttention",
    "sdpa": "minigpt4_runtime.kernels.attention_sdpa:SdpaAttention",
    "triton": "minigpt4_runtime.kernels.attention_triton:TritonAttention",
    "npu": "minigpt4_runtime.kernels.attention_npu:NpuAttention",
}


def attention_kernel(name: str) -> type[AttentionKernel]:
    """The kernel of that name in ATTENTION_KERNELS."""
    return cast(type[AttentionKernel], resolve_name(ATTENTION_KERNELS[name]))


def bind_attention(names: Sequence[str], cache: KeyValueCache) -> AttentionKernel:
    """The first of these kernels that takes the cache, bound to it.

    Raises:
        BackendUnavailableError: none of them does.
    """
    for name in names:
        kernel = attention_kernel(name)
        if kernel.limits.takes(cache):
            return kernel(cache)
    raise BackendUnavailableError(
        f"No attention kernel of this device ({', '.join(names)}) takes keys and values of "
        f"{str(cache.dtype).removeprefix('torch.')} in blocks of {cache.shape.block_size} tokens. "
        "Choose another cache_dtype or block_size."
    )
