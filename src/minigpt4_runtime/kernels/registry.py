"""Names → kernels, as tables of "module:attribute".

Owns   which names exist. Never imports a kernel before it is chosen.
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import cast

import torch

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.formats.contracts import InOrder, LinearKernel, WeightFormat
from minigpt4_runtime.kernels.contracts import AttentionKernel, RowChoice
from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS, RowOperations
from minigpt4_runtime.optional import runs_triton

ATTENTION_KERNELS = {
    "reference": "minigpt4_runtime.kernels.attention_reference:ReferenceAttention",
    "sdpa": "minigpt4_runtime.kernels.attention_sdpa:SdpaAttention",
    "triton": "minigpt4_runtime.kernels.attention_triton:TritonAttention",
    "npu": "minigpt4_runtime.kernels.attention_npu:NpuAttention",
    "native": "minigpt4_runtime.kernels.attention_native:NativeAttention",
}
# By the family of a weight format and the kind of device, or "*" for any other.
# What a row leads to may give None: the kernel is not installed.
LINEAR_KERNELS = {
    ("float", "cpu"): "minigpt4_runtime.kernels.linear_dense:prepare",
    ("w8a16", "cpu"): "minigpt4_runtime.kernels.native:prepare_w8a16",
    ("w8a8", "cpu"): "minigpt4_runtime.kernels.native:prepare_w8a8",
    ("w4a16", "cpu"): "minigpt4_runtime.kernels.native:prepare_w4a16",
    ("w4a8", "cpu"): "minigpt4_runtime.kernels.native:prepare_w4a8",
    ("w8a16-sparse24", "cpu"): "minigpt4_runtime.kernels.native:prepare_w8a16_sparse24",
    ("w8a8-sparse24", "cpu"): "minigpt4_runtime.kernels.native:prepare_w8a8_sparse24",
    ("float", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_float",
    ("w8a16", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w8a16",
    ("w8a8", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w8a8",
    ("w4a16", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w4a16",
    ("w4a8", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w4a8",
    ("w8a16-sparse24", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w8a16_sparse24",
    ("w8a8-sparse24", "cuda"): "minigpt4_runtime.kernels.linear_triton:prepare_w8a8_sparse24",
    ("w8a8-fp8", "cuda"): "minigpt4_runtime.kernels.linear_float8:prepare",
}

# By the kind of device; torch's own without a row.
ROW_OPERATIONS = {
    "cpu": "minigpt4_runtime.kernels.row_operations_native:prepare",
    "cuda": "minigpt4_runtime.kernels.row_operations_triton:TritonOperations",
}
# By the kind of device; the engine's own in torch without a row.
ROW_CHOICES = {"cuda": "minigpt4_runtime.kernels.choosing_triton:TritonChoice"}


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


def row_operations(device: torch.device) -> RowOperations:
    """What lies between the products, on a device."""
    if (target := ROW_OPERATIONS.get(device.type)) and _runs_kernels(device):
        return cast(RowOperations, resolve_name(target)())
    return TORCH_OPERATIONS


def row_choice(device: torch.device) -> RowChoice | None:
    """What chooses an id from each row of scores on a device; None: the engine's own."""
    if (target := ROW_CHOICES.get(device.type)) and _runs_kernels(device):
        return cast(RowChoice, resolve_name(target)())
    return None


def linear_kernel(
    weight_format: WeightFormat, *, device: torch.device, widen_from: int | None
) -> LinearKernel | InOrder:
    """The product with weights of a format on a device: the table's, else the format's own.

    `widen_from` is the number of rows from which on that device multiplies faster in float32.
    """
    for kind in (device.type, "*") if _runs_kernels(device) else ("*",):
        if target := LINEAR_KERNELS.get((weight_format.family, kind)):
            kernel = cast(LinearKernel | InOrder | None, resolve_name(target)(widen_from))
            return kernel or weight_format.multiply
    return weight_format.multiply


def _runs_kernels(device: torch.device) -> bool:
    """Whether the rows of a device's kind are for this device: of a GPU, if Triton runs on it."""
    if device.type != "cuda":
        return True
    return torch.cuda.is_available() and runs_triton(torch.cuda.get_device_capability(device))
