"""The search for the numbers by which floats are rounded to integers, and the rounding of rows.

Owns   the clipping range of a group: the scale, or scale and zero point, of the least error.
Takes  groups of floats (…, g), float32; gives a scale (and zero point) for each group (…,).
Never  knows how integers are stored; loads no torch before it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The largest value of a group is cut to these shares of itself: a finer grid for all the others.
_SHARES = tuple(1 - step / 40 for step in range(17))
# The least scale that float16 holds: a group of zeros has no other.
SMALLEST_SCALE = 2.0**-24


def find_scales(groups: Tensor, low: int, high: int, importance: Tensor | None = None) -> Tensor:
    """The scale with which `low` to `high` come nearest to each group: (…, g) → (…,).

    `importance` weighs the square of each number's error. Where `low` reaches further than `high`,
    the scale has the sign that gives the further end to the group's largest number.
    """
    import torch

    weights = torch.ones(()) if importance is None else importance
    ends = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    ends = ends / low if -low > high else ends.abs() / high
    ends = torch.where(ends.abs() < SMALLEST_SCALE, SMALLEST_SCALE, ends)
    weighted = groups * weights
    best = torch.full_like(ends, -1.0)
    scales = ends.clone()
    for share in _SHARES:
        integers = (groups / (ends * share)).round_().clamp_(low, high)
        product = (weighted * integers).sum(-1, keepdim=True)
        length = (integers.square() * weights).sum(-1, keepdim=True).clamp_(min=1e-30)
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

    weights = torch.ones(()) if importance is None else importance
    # A range holds zero, so that zero is exact.
    least = groups.amin(-1, keepdim=True).clamp_(max=0)
    most = groups.amax(-1, keepdim=True).clamp_(min=0)
    best = torch.full_like(least, float("inf"))
    scales, zeros = torch.ones_like(least), torch.zeros_like(least)
    for share in _SHARES:
        scale = ((most - least) * (share / (high - low))).clamp_(min=SMALLEST_SCALE)
        zero = (low - least * share / scale).round_().clamp_(low, high)
        integers = (groups / scale + zero).round_().clamp_(low, high)
        error = ((integers - zero) * scale - groups).square_().mul_(weights)
        error = error.sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales.squeeze(-1), zeros.squeeze(-1)


def round_rows(rows: Tensor, group_size: int) -> Tensor:
    """(…, in) float32 → the same, rounded to 255 steps between ± the largest of each group."""
    groups = rows.reshape(*rows.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (groups / scale).round().mul(scale).reshape(rows.shape)
