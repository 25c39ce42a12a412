"""Products of 8-bit floats on CUDA.

Owns   the route: a few rows are multiplied by numbers that are widened in registers, which reads
       the weight once (weight_triton.py); many by torch's own kernel, on tensor cores that take 8
       bits. GPUs and sizes that these do not take are left to the format itself.
Takes  rows and the parts of a weight of `Float8Format`; gives rows.
Never  asks the GPU for anything, so that a step can be captured as a graph.

Checked under Triton's interpreter, and on a CPU, where torch has the same operator: it has not run
on a GPU yet.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.float8 import FLOAT8
from minigpt4_runtime.kernels.rounding_triton import round_to_float8, scale_sums
from minigpt4_runtime.kernels.weight_triton import StoredWeight

# torch's kernel multiplies 16 rows at least, and its sums need a launch more. Reasoned, unmeasured.
FEW_ROWS = 64
# What torch asks of the sizes of a weight, and of the GPU.
_STEP = 16
_CAPABILITY = (8, 9)


def prepare(widen_from: int | None) -> LinearKernel:  # noqa: ARG001
    """For the row of LINEAR_KERNELS."""
    return _multiply


def _multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    numbers, scales = parts["weight"], parts["weight_scale"]
    num_outputs, num_inputs = numbers.shape
    flat = rows.reshape(-1, num_inputs).contiguous()
    is_few, is_odd = len(flat) <= FEW_ROWS, num_outputs % _STEP or num_inputs % _STEP
    if not _multiplies_float8(rows.device) or (is_odd and not is_few):
        return FLOAT8.multiply(rows, parts, bias)
    weight = StoredWeight("float8", numbers, scales)
    if len(flat) == 1:
        product = weight.multiply_one(flat, bias, rounding="float8")
        return product.view(*rows.shape[:-1], num_outputs)
    rounded, row_scales = round_to_float8(flat)
    if is_few:
        product = weight.multiply_few(rounded, bias, row_scales=row_scales, dtype=rows.dtype)
        return product.view(*rows.shape[:-1], num_outputs)
    one = _one(rows.device)
    # With scales for rows it rounds to 16 bits on most GPUs; so they come after it.
    sums = torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it.
        rounded,
        numbers.view(torch.float8_e4m3fn).T,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.float32,
    )
    product = scale_sums(sums, row_scales, scales, bias, rows.dtype)
    return product.view(*rows.shape[:-1], num_outputs)


@cache
def _multiplies_float8(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= _CAPABILITY


@cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # Kept for gradients too.
        return torch.ones((), device=device)
