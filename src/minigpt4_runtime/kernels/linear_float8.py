"""Products of 8-bit floats on CUDA, by torch's own kernel for them.

Owns   which weights and GPUs it takes; elsewhere the format multiplies by itself.
Takes  rows and the parts of a weight of `Float8Format`; gives rows.
Never  asks the GPU for anything, so that a step can be captured as a graph.

Checked on a CPU, where torch has the same operator: it has not run on a GPU yet.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.float8 import FLOAT8
from minigpt4_runtime.kernels.rounding_triton import round_to_float8, scale_sums

# What torch asks of the sizes of a weight, and of the GPU.
_STEP = 16
_CAPABILITY = (8, 9)


def prepare(widen_from: int | None) -> LinearKernel:  # noqa: ARG001
    """For the row of LINEAR_KERNELS."""
    return _multiply


def _multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    numbers = parts["weight"].view(torch.float8_e4m3fn)
    num_outputs, num_inputs = numbers.shape
    if num_outputs % _STEP or num_inputs % _STEP or not _multiplies_float8(rows.device):
        return FLOAT8.multiply(rows, parts, bias)
    flat = rows.reshape(-1, num_inputs).contiguous()
    rounded, row_scales = round_to_float8(flat)
    one = _one(rows.device)
    # With scales for rows it rounds to 16 bits on most GPUs; so they come after it.
    sums = torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it.
        rounded, numbers.T, scale_a=one, scale_b=one, out_dtype=torch.float32
    )
    product = scale_sums(sums, row_scales, parts["weight_scale"], bias, rows.dtype)
    return product.view(*rows.shape[:-1], num_outputs)


@cache
def _multiplies_float8(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= _CAPABILITY


@cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # Kept for gradients too.
        return torch.ones((), device=device)
