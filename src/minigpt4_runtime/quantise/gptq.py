"""Rounding that makes up for its own errors: GPTQ (Frantar et al., 2022, arXiv 2210.17323).

Owns   the order of columns and the correction of those that are still to be rounded.
Takes  a weight of floats, the sum of its inputs' products, and an IntegerFormat; gives integers and
       their grid.
Never  knows where inputs come from.

Each column is rounded in turn, the one with the largest inputs first. What that does to the
product is taken off the columns that follow, as the second derivative of the square error, which
is the sum of the inputs' products, says. Grids are found before, on the weight as it is.
"""

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
    weight = weight.float()
    products = products.clone()
    diagonal = products.diagonal()
    never_used = diagonal == 0
    diagonal[never_used] = 1
    grid = chosen.find_grid(weight, importance=diagonal.clone())
    order = diagonal.argsort(descending=True)
    products.diagonal().add_(_DAMPING * float(diagonal.mean()))
    upper = _inverse_factor(products[order][:, order])
    size = weight.shape[1] // grid.scale.shape[1]
    # Turned, so that a column lies in one piece.
    scales = grid.scale.repeat_interleave(size, 1).T[order]
    zeros = torch.zeros(())
    if grid.zero_point is not None:
        zeros = grid.zero_point.repeat_interleave(size, 1).T[order]
    rest = weight.T[order]
    for first in range(0, len(rest), _BLOCK):
        last = min(first + _BLOCK, len(rest))
        errors = torch.empty(last - first, len(weight))
        for column in range(first, last):
            scale, zero = scales[column], zeros[column] if zeros.ndim else zeros
            whole = (rest[column] / scale + zero).round_().clamp_(*chosen.limits)
            error = rest[column] - (whole - zero) * scale
            errors[column - first] = error / upper[column, column]
            rest[column] = whole
            later = upper[column, column + 1 : last]
            rest[column + 1 : last].addr_(later, errors[column - first], alpha=-1)
        rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return rest[order.argsort()].T.to(torch.int8).contiguous(), grid


def _inverse_factor(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: a row has what a column's error costs the later."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products.double()))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
