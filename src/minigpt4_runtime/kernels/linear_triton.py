"""Products with weights of 8 and 4 bits and of 2:4 sparsity on CUDA.

Owns   the route, chosen by the number of rows: a few are multiplied by numbers widened in registers
       (integer_triton.py), many by a matrix that is widened for the product, or, where rows and
       weights are 8 bits with one scale, as whole numbers by torch.
Takes  rows and the parts of a weight; gives rows.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.kernels.integer_triton import Layout, StoredWeight
from minigpt4_runtime.kernels.rounding_triton import round_rows, round_to_int8, scale_sums

# To widen a weight moves five bytes for each number; to read it again for each 64 rows moves one or
# less. With more rows tensor cores are the limit, which torch uses better. Reasoned, not measured.
FEW_ROWS = 128
# What torch's product of whole numbers asks for.
_WHOLE_STEP = 8
_PART_NAMES: dict[Layout, tuple[str, ...]] = {
    "int8": ("weight", "weight_scale", "weight_zero_point"),
    "int4": ("weight_packed", "weight_scale", "weight_zero_point"),
    "sparse24": ("weight_values", "weight_scale", "", "weight_positions"),
}


def _multiply(
    layout: Layout,
    rounds_rows: bool,
    rows: Tensor,
    parts: Mapping[str, Tensor],
    bias: Tensor | None,
) -> Tensor:
    weight = StoredWeight(layout, *map(parts.get, _PART_NAMES[layout]))  # type: ignore[arg-type]
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    if len(flat) > FEW_ROWS and rounds_rows and _is_whole(weight):
        product = _multiply_whole(flat, weight, bias)
    else:
        if rounds_rows:
            flat = round_rows(flat, weight.group_size)
        if len(flat) <= FEW_ROWS:
            product = weight.multiply_few(flat, bias)
        else:
            bias = None if bias is None else bias.to(flat.dtype)
            product = functional.linear(flat, weight.widen(flat.dtype), bias)
    return product.view(*rows.shape[:-1], product.shape[-1])


def _is_whole(weight: StoredWeight) -> bool:
    """Whether products with 8-bit rows are sums of whole numbers, which one scale follows."""
    return (
        weight.layout != "int4"
        and weight.group_size is None
        and weight.zeros is None
        and weight.num_inputs % _WHOLE_STEP == weight.num_outputs % _WHOLE_STEP == 0
    )


def _multiply_whole(rows: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    rounded, row_scales = round_to_int8(rows)
    matrix = weight.numbers if weight.layout == "int8" else weight.widen(torch.int8)
    sums = torch._int_mm(rounded, matrix.T)  # noqa: SLF001 - torch has no public name for it.
    return scale_sums(sums, row_scales, weight.scales, bias, rows.dtype)


def _prepare(
    layout: Layout,
    rounds_rows: bool,
    widen_from: int | None,  # noqa: ARG001
) -> LinearKernel:
    return partial(_multiply, layout, rounds_rows)


# For the rows of LINEAR_KERNELS: the family of formats is in the name.
prepare_w8a16 = partial(_prepare, "int8", False)
prepare_w8a8 = partial(_prepare, "int8", True)
prepare_w4a16 = partial(_prepare, "int4", False)
prepare_w4a8 = partial(_prepare, "int4", True)
prepare_w8a16_sparse24 = partial(_prepare, "sparse24", False)
prepare_w8a8_sparse24 = partial(_prepare, "sparse24", True)
