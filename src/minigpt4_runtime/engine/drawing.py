"""The choice of an id from each row of scores, in torch: it **defines** correct.

Owns   the random numbers of a draw, and the limits of temperature, top-k, top-p and min-p.
Takes  (d, V) float32 scores and the lots; gives ids on the same device.
Never  waits for the device. Kernels for some devices do the same: see `RowChoice`.

A draw is a race: of p and exponentials E, the largest p / E wins. An id's E comes from the row's
key and the id by whole numbers alone, so that all devices have the same, nothing is sent to them,
and none is drawn that is not looked at. A generator's would have to be drawn in order on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.kernels.contracts import Lots

FORBIDDEN = float("-inf")


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number


# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Limits(NamedTuple):
    """Some rows (s,), and what each is limited by: (s, 1), or (s, V) ids that are allowed."""

    rows: Tensor
    values: Tensor


class TorchChoice:
    """See `RowChoice`."""

    def best(self, logits: Tensor) -> Tensor:
        """See `RowChoice`."""
        # The sum of a row with NaN or inf is not finite, and sums of logits do not overflow.
        return torch.stack((logits.argmax(-1), torch.isfinite(logits.sum(-1))))

    def draw(self, scores: Tensor, lots: Lots) -> Tensor:
        """See `RowChoice`."""
        settings, device = lots.settings, scores.device
        temperature = send(_column([each.temperature for each in settings]), device)
        # From the largest down and in float64, no temperature is too low: nothing overflows.
        scores = (scores - scores.amax(-1, keepdim=True)).double() / temperature
        top_k = [min(each.top_k, scores.shape[1]) or None for each in settings]
        largest = max(each or 0 for each in top_k)
        forbid(scores, _limits(top_k, device), partial(_below_top_k, largest=largest))
        dropped = [1.0 - each.top_p if each.top_p < 1.0 else None for each in settings]
        forbid(scores, _limits(dropped, device), _beyond_top_p)
        # The largest is 0 here: a score is the logarithm of a share of the likeliest one's.
        least = [math.log(each.min_p) if each.min_p else None for each in settings]
        forbid(scores, _limits(least, device), torch.lt)
        keys = send(torch.tensor(lots.keys), device)
        return (scores.softmax(-1) / exponentials(keys, scores.shape[1])).argmax(-1)


TORCH_CHOICE = TorchChoice()


def exponentials(keys: Tensor, count: int) -> Tensor:
    """(d,) int64 keys → (d, count) float64 of the exponential distribution, none of them 0."""
    ids = torch.arange(1, count + 1, device=keys.device)
    bits = keys[:, None] + ids * _STEP
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    # The upper 52 bits and a half: a float64 holds both, and neither 0 nor 1 comes out.
    bits = _shifted(bits ^ _shifted(bits, 31), 12)
    return (bits.double() + 0.5).mul_(2.0**-52).log_().neg_()


def _shifted(bits: Tensor, count: int) -> Tensor:
    """To the right, as if there were no sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def forbid(
    scores: Tensor, limits: Limits | None, is_forbidden: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """In the rows that are limited, in place: `is_forbidden` sees them, and their limits."""
    if limits is None:
        return
    is_every_row = len(limits.rows) == len(scores)
    some = scores if is_every_row else scores.index_select(0, limits.rows)
    some.masked_fill_(is_forbidden(some, limits.values), FORBIDDEN)
    if not is_every_row:
        scores.index_copy_(0, limits.rows, some)


def where(are_meant: Many[bool], device: torch.device) -> Tensor | None:
    """The numbers of the rows that are meant, on a device; None if there are none."""
    rows = [row for row, is_meant in enumerate(are_meant) if is_meant]
    return send(torch.tensor(rows), device) if rows else None


def _column(values: Many[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _limits(values: Many[float | None], device: torch.device) -> Limits | None:
    rows = where([value is not None for value in values], device)
    if rows is None:
        return None
    return Limits(rows, send(_column([value for value in values if value is not None]), device))


def _below_top_k(scores: Tensor, top_k: Tensor, *, largest: int) -> Tensor:
    least = scores.topk(largest).values.gather(1, top_k.long() - 1)
    return scores < least


def _beyond_top_p(scores: Tensor, dropped_share: Tensor) -> Tensor:
    # Stable, so that of equals the same are dropped everywhere.
    ascending, order = scores.sort(stable=True)
    is_beyond = ascending.softmax(-1).cumsum(-1) <= dropped_share
    is_beyond[:, -1] = False
    return is_beyond.scatter(1, order, is_beyond)
