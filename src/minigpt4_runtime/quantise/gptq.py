"""Rounding and pruning that make up for their own errors: GPTQ and SparseGPT.

Owns   the order of columns and the correction of those that are still to be settled.
Takes  a weight of floats and the sum of its inputs' products; gives integers of an IntegerFormat
       and their grid, or floats of which two in every four neighbours are zero.
Never  knows where inputs come from.

GPTQ (Frantar et al., 2022, arXiv 2210.17323) rounds each column in turn, the one with the largest
inputs first. What that does to the product is taken off the columns that follow, as the second
derivative of the square error, which is the sum of the inputs' products, says. Grids are found
before, on the weight as it is. SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774) does the
same with columns in their order, and chooses in every four the two whose loss costs least by then.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minigpt4_runtime.formats.integer import Grid, IntegerFormat

# So much of the mean diagonal is added to it, as in the paper: inputs may depend on each other.
_DAMPING = 0.01
# Columns whose correction of later ones is put off, so that it is one large product.
_BLOCK = 128


def round_by_inputs(weight: Tensor, products: Tensor, chosen: IntegerFormat) -> tuple[Tensor, Grid]:
    """The integers (out, in) of a weight, and their grid.

    `products` (in, in) is the sum over all inputs x (in,) of x · xᵀ, in float32.
    """
    weight, products = weight.float(), _of_used_inputs(products)
    grid = chosen.find_grid(weight, importance=products.diagonal().clone())
    order = products.diagonal().argsort(descending=True)
    size = weight.shape[1] // grid.scale.shape[1]
    # Turned, so that a column lies in one piece.
    scales = grid.scale.repeat_interleave(size, 1).T[order]
    zeros = torch.zeros(1).expand_as(scales)
    if grid.zero_point is not None:
        zeros = grid.zero_point.repeat_interleave(size, 1).T[order]
    integers = torch.empty_like(scales)

    def round_column(column: int, rest: Tensor) -> Tensor:
        scale, zero = scales[column], zeros[column]
        integers[column] = (rest[column] / scale + zero).round_().clamp_(*chosen.limits)
        return (integers[column] - zero) * scale

    _settle(weight.T[order], products[order][:, order], round_column)
    return integers[order.argsort()].T.to(torch.int8).contiguous(), grid


def prune_by_inputs(weight: Tensor, products: Tensor) -> Tensor:
    """The weight (out, in) with two zeros in every four inputs, the others moved to make up.

    `products` as for `round_by_inputs`; the number of inputs is a multiple of four.
    """
    products = _of_used_inputs(products)
    costs = _inverse_factor(products).diagonal()[:, None] ** -2
    is_lost = torch.empty(4, len(weight), dtype=torch.bool)

    def prune_column(column: int, rest: Tensor) -> Tensor:
        if column % 4 == 0:
            four = slice(column, column + 4)
            lost = (rest[four].square() * costs[four]).topk(2, dim=0, largest=False).indices
            is_lost.fill_(False).scatter_(0, lost, True)
        return rest[column].masked_fill(is_lost[column % 4], 0)

    return _settle(weight.float().T.clone(), products, prune_column).T.contiguous()


def _settle(rest: Tensor, products: Tensor, settle: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Settle the columns, which are the rows of `rest` (in, out), in turn and in place.

    `settle` gives what a column becomes, from its number and all columns as they are by then.
    """
    upper = _inverse_factor(products)
    for first in range(0, len(rest), _BLOCK):
        last = min(first + _BLOCK, len(rest))
        errors = torch.empty(last - first, rest.shape[1])
        for column in range(first, last):
            settled = settle(column, rest)
            errors[column - first] = (rest[column] - settled) / upper[column, column]
            rest[column] = settled
            later = upper[column, column + 1 : last]
            rest[column + 1 : last].addr_(later, errors[column - first], alpha=-1)
        rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return rest


def _of_used_inputs(products: Tensor) -> Tensor:
    """The products, and 1 for each input that never comes with itself."""
    products = products.clone()
    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1
    return products


def _inverse_factor(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: a row has what a column's error costs the later."""
    damped = products.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
