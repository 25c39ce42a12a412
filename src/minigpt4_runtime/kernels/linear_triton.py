"""Products with weights of floats, of 8 and 4 bits, and of 2:4 sparsity on CUDA.

Owns   the route, chosen by the number of rows: a few are multiplied by numbers widened in registers
       (weight_triton.py), many by a matrix that is widened for the product, or, where rows are 8
       bits, as whole numbers: by torch where a row of the weight has one scale, else by
       whole_triton.py; not those of 8-bit zero points, and of fine groups. Many rows with a 2:4
       sparse weight take linear_sparse.py where that is faster. Of floats, one row is multiplied
       here, where torch's product leaves memory idle; all others are for torch.
Takes  rows and the parts of a weight; gives rows.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.formats.contracts import InOrder, LinearKernel
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.kernels.linear_sparse import least_rows, multiply_plain, multiply_sparse
from minigpt4_runtime.kernels.rounding_triton import round_rows, round_to_int8, scale_sums
from minigpt4_runtime.kernels.weight_triton import Layout, StoredWeight
from minigpt4_runtime.kernels.whole_triton import multiply_whole

# To widen a weight moves five bytes for each number; to read it again for each 64 rows moves one or
# less. With more rows tensor cores are the limit, which torch uses better. Reasoned, not measured.
FEW_ROWS = 128
# What torch's product of whole numbers asks for.
_WHOLE_STEP = 8
# In smaller groups, scaling each group's sums takes longer than tensor cores take for twice as many
# products of halves: 3 operations for each 32 products. Reasoned, not measured.
_LEAST_GROUP = 64
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
    *,
    sparse_from: int | None = None,
) -> Tensor:
    weight = StoredWeight(layout, *map(parts.get, _PART_NAMES[layout]))  # type: ignore[arg-type]
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    is_sparse = sparse_from is not None and len(flat) >= sparse_from
    if len(flat) == 1:
        product = weight.multiply_one(flat, bias, rounding="int8" if rounds_rows else None)
    elif len(flat) <= FEW_ROWS:
        few = round_rows(flat, weight.group_size) if rounds_rows else flat
        product = weight.multiply_few(few, bias)
    elif rounds_rows and _is_whole(weight):
        product = _multiply_many_whole(flat, weight, bias, is_sparse=is_sparse)
    else:
        many = round_rows(flat, weight.group_size) if rounds_rows else flat
        product = _multiply_many_floats(many, weight, bias, is_sparse=is_sparse)
    return product.view(*rows.shape[:-1], product.shape[-1])


def _multiply_floats(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    weight = parts["weight"]
    if rows.numel() != weight.shape[1] or rows.dtype != weight.dtype:
        return DENSE.multiply(rows, parts, bias)
    product = StoredWeight("float", weight, None).multiply_one(rows.reshape(1, -1), bias)
    return product.view(*rows.shape[:-1], len(weight))


def _is_whole(weight: StoredWeight) -> bool:
    """Whether products with 8-bit rows are best made of whole numbers, if there are many."""
    has_coarse_groups = weight.group_size is None or weight.group_size >= _LEAST_GROUP
    # Of 4 bits, a number less its zero point fits into 8.
    return has_coarse_groups and (weight.zeros is None or weight.layout == "int4")


def _multiply_many_floats(
    rows: Tensor, weight: StoredWeight, bias: Tensor | None, *, is_sparse: bool
) -> Tensor:
    bias, matrix = None if bias is None else bias.to(rows.dtype), weight.widen(rows.dtype)
    if not is_sparse or rows.element_size() != 2:
        return functional.linear(rows, matrix, bias)
    product = multiply_sparse(rows, matrix)
    return product if bias is None else product + bias


def _multiply_many_whole(
    rows: Tensor, weight: StoredWeight, bias: Tensor | None, *, is_sparse: bool
) -> Tensor:
    assert weight.scales is not None, "floats are not whole"
    rounded, row_scales = round_to_int8(rows, weight.group_size)
    matrix = weight.numbers if weight.layout == "int8" else weight.widen(torch.int8)
    if weight.group_size is None and not any(size % _WHOLE_STEP for size in matrix.shape):
        sums = (multiply_sparse if is_sparse else multiply_plain)(rounded, matrix)
        return scale_sums(sums, row_scales, weight.scales, bias, rows.dtype)
    return multiply_whole(rounded, row_scales, matrix, weight.scales, bias, rows.dtype)


def _prepare(
    layout: Layout,
    rounds_rows: bool,
    widen_from: int | None,  # noqa: ARG001
) -> LinearKernel:
    return partial(_multiply, layout, rounds_rows)


def _prepare_sparse(rounds_rows: bool, widen_from: int | None) -> InOrder:  # noqa: ARG001
    """What is faster is measured when a weight is loaded, on its device."""

    def arrange(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LinearKernel]:
        kept = parts["weight_values"]
        dtype = torch.int8 if rounds_rows else torch.float16
        sparse_from = least_rows((len(kept), 2 * kept.shape[1]), dtype, kept.device)
        return dict(parts), partial(_multiply, "sparse24", rounds_rows, sparse_from=sparse_from)

    return InOrder(arrange)


def prepare_float(widen_from: int | None) -> LinearKernel:  # noqa: ARG001
    """For the row of LINEAR_KERNELS."""
    return _multiply_floats


# For the rows of LINEAR_KERNELS: the family of formats is in the name.
prepare_w8a16 = partial(_prepare, "int8", False)
prepare_w8a8 = partial(_prepare, "int8", True)
prepare_w4a16 = partial(_prepare, "int4", False)
prepare_w4a8 = partial(_prepare, "int4", True)
prepare_w8a16_sparse24 = partial(_prepare_sparse, False)
prepare_w8a8_sparse24 = partial(_prepare_sparse, True)
