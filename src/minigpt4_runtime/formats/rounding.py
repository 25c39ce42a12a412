"""The search for the numbers by which floats are rounded to integers, and the rounding of rows.

Owns   the clipping range of a group: the scale, or scale and zero point, of the least error.
Takes  groups of floats (…, g), float32; gives a scale (and zero point) for each group (…,).
Never  knows how integers are stored; loads no torch before it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The largest number of a group is cut to these shares of itself: a finer grid for all the others.
_SHARES = tuple(1 - step / 20 for step in range(9))
# The least scale that float16 holds: a group of zeros has no other.
SMALLEST_SCALE = 2.0**-24


def find_scales(groups: Tensor, low: int, high: int, importance: Tensor | None = None) -> Tensor:
    """The scale with which `low` to `high` come nearest to each group: (…, g) → (…,).

    `importance` weighs the square of each number's error. Where `low` reaches further than `high`,
    the scale has the sign that gives the further end to the group's largest number.
    """
    import torch

    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if -low > high:
        ends = torch.where(-least > most, least, most) / low
    else:
        ends = torch.maximum(-least, most) / high
    ends = torch.where(ends.abs() < SMALLEST_SCALE, SMALLEST_SCALE, ends)
    weighted = groups if importance is None else groups * importance
    best, scales = torch.full_like(ends, -1.0), ends
    # Two buffers for all trials: new ones would cost more than the sums.
    integers, terms = torch.empty_like(groups), torch.empty_like(groups)
    for share in _SHARES:
        torch.mul(groups, (ends * share).reciprocal_(), out=integers)
        integers.round_().clamp_(low, high)
        product = torch.mul(integers, weighted, out=terms).sum(-1, keepdim=True)
        squares = torch.mul(integers, integers, out=terms)
        if importance is not None:
            squares *= importance
        length = squares.sum(-1, keepdim=True).clamp_(min=1e-30)
        # With the best scale for these integers, the square of the error is less by this.
        gain = product.square() / length
        better = gain > best
        best = torch.where(better, gain, best)
        scales = torch.where(better, product / length, scales)
    return torch.where(scales.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scales).squeeze(-1)


def find_ranges(
    groups: Tensor, low: int, high: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and zero point (a whole number from `low` to `high`) for each group, as above.

    A number stands for (integer - zero point) · scale.
    """
    import torch

    # A range holds zero, so that zero is exact.
    least = groups.amin(-1, keepdim=True).clamp_(max=0)
    most = groups.amax(-1, keepdim=True).clamp_(min=0)
    best = torch.full_like(least, float("inf"))
    scales, zeros = torch.ones_like(least), torch.zeros_like(least)
    found = torch.empty_like(groups)
    for share in _SHARES:
        scale = ((most - least) * (share / (high - low))).clamp_(min=SMALLEST_SCALE)
        zero = (low - least * share / scale).round_().clamp_(low, high)
        torch.mul(groups, scale.reciprocal(), out=found)
        # The zero point is whole: it can be taken off the limits in place of being added.
        found.round_().clamp_(low - zero, high - zero)
        found.mul_(scale).sub_(groups).square_()
        if importance is not None:
            found *= importance
        error = found.sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales.squeeze(-1), zeros.squeeze(-1)


def round_rows(rows: Tensor, group_size: int) -> Tensor:
    """(…, in) float32 → the same, rounded to 255 steps between ± the largest of each group."""
    groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // group_size, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (groups / scale).round().mul(scale).reshape(rows.shape)
