"""The choice of an id from each row of scores on CUDA, by Triton.

Owns   the kernels, one launch each: the largest, and the draw by temperature, top-k, top-p and
       min-p. A program has a whole row, which stays in the GPU's caches.
Takes  (R, V) float32 scores, and lots; gives ids as `engine/drawing.py` does.
Never  sorts, nor asks the GPU for anything. Where torch sorts the vocabulary for top-p, the edge of
       what is kept is found by bisection: a step adds up what lies beyond a score.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.kernels.contracts import Lots
from minigpt4_runtime.kernels.launching import on_device_of
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

_IDS_AT_ONCE = 4096
_SIZES = {"num_warps": 16}
# A score's distance from the largest, as the bits of a float32 without its sign: an int32 that is
# larger the less likely an id is. This one is of what is forbidden.
_FORBIDDEN: tl.constexpr = tl.constexpr(0x7F800000)


class TritonChoice:
    """See `RowChoice`."""

    def best(self, logits: Tensor) -> Tensor:
        """See `RowChoice`."""
        num_rows, vocab_size = logits.shape
        found = logits.new_empty(2, num_rows, dtype=torch.int64)
        with on_device_of(logits):
            _find_best[(num_rows,)](
                logits.contiguous(), found, num_rows, vocab_size, IDS=_IDS_AT_ONCE, **_SIZES
            )
        return found

    def draw(self, scores: Tensor, lots: Lots) -> Tensor:
        """See `RowChoice`."""
        num_rows, vocab_size = scores.shape
        numbers = send(_pack(lots, vocab_size), scores.device)
        shares = torch.empty_like(scores, dtype=torch.float64)
        chosen = scores.new_empty(num_rows, dtype=torch.int64)
        with on_device_of(scores):
            _draw[(num_rows,)](
                scores.contiguous(), numbers, shares, chosen, num_rows, vocab_size,
                IDS=_IDS_AT_ONCE, **_SIZES,
            )  # fmt: skip
        return chosen


def _pack(lots: Lots, vocab_size: int) -> Tensor:
    """(5, d) float64, sent as one: see `_draw`. What does not limit a row has a number too."""
    rows = [
        (
            each.temperature,
            min(each.top_k or vocab_size, vocab_size),
            1.0 - each.top_p,
            math.log(each.min_p) if each.min_p else -math.inf,
        )
        for each in lots.settings
    ]
    keys = torch.tensor([lots.keys]).view(torch.float64)
    return torch.cat((torch.tensor(rows, dtype=torch.float64).T, keys))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _find_best(
    logits: tl.tensor,  # (R, V)
    found: tl.tensor,  # (2, R): ids; and whether all of a row is finite.
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    IDS: tl.constexpr,  # How many are looked at at once.
) -> None:
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * vocab_size
    largest, best, num_wrong = float("-inf"), 0, 0
    for first in range(0, vocab_size, IDS):
        ids = first + tl.arange(0, IDS)
        some = tl.load(own + ids, ids < vocab_size, float("-inf"))
        top, at = tl.max(some, 0, return_indices=True)
        best = tl.where(top > largest, first + at, best)
        largest = tl.maximum(largest, top)
        is_wrong = (ids < vocab_size) & ~(tl.abs(some) < float("inf"))
        num_wrong += tl.sum(is_wrong.to(tl.int32), 0)
    tl.store(found + row, best)
    tl.store(found + num_rows + row, num_wrong == 0)


@triton.jit  # type: ignore[untyped-decorator]
def _distances(
    scores: tl.tensor, largest: tl.tensor, first: tl.tensor, vocab_size: tl.tensor,
    IDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Those of some ids, as int32: see `_FORBIDDEN`. What is beyond the last id has one beyond."""
    ids = first + tl.arange(0, IDS)
    below = tl.load(scores + ids, ids < vocab_size, float("-inf")) - largest
    return tl.where(ids < vocab_size, below.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _beyond(  # noqa: PLR0917
    scores: tl.tensor,
    shares: tl.tensor,  # (V,) float64, or None: each counts 1.
    largest: tl.tensor,
    edge: tl.tensor,
    farthest: tl.tensor,
    vocab_size: tl.tensor,
    IDS: tl.constexpr,
) -> tl.tensor:
    """What lies beyond the edge, and not beyond the farthest that is kept, in all: float64."""
    total = tl.zeros((IDS,), tl.float64)
    for first in range(0, vocab_size, IDS):
        distances = _distances(scores, largest, first, vocab_size, IDS)
        counts = (distances > edge) & (distances <= farthest)
        if shares is None:
            total += counts.to(tl.float64)
        else:
            ids = first + tl.arange(0, IDS)
            total += tl.load(shares + ids, counts, 0.0)
    return tl.sum(total, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _least_edge(  # noqa: PLR0917
    scores: tl.tensor,
    shares: tl.tensor,  # As in `_beyond`.
    largest: tl.tensor,
    farthest: tl.tensor,
    limit: tl.tensor,
    vocab_size: tl.tensor,
    IDS: tl.constexpr,
) -> tl.tensor:
    """The smallest distance beyond which lies no more than the limit."""
    low, high = 0, farthest
    while low < high:
        middle = low + (high - low) // 2
        fits = _beyond(scores, shares, largest, middle, farthest, vocab_size, IDS) <= limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return high


@triton.jit  # type: ignore[untyped-decorator]
def _exponentials(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """As `exponentials` of engine/drawing.py: float64."""
    bits = key.to(tl.uint64) + (ids + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = (bits ^ (bits >> 31)) >> 12
    return -tl.log((bits.to(tl.int64).to(tl.float64) + 0.5) / 4503599627370496.0)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _draw(  # noqa: PLR0915, PLR0917
    scores: tl.tensor,  # (d, V)
    # (5, d) float64: temperature, how many of the likeliest are kept, the share of the least likely
    # that is dropped, the logarithm of min-p, and the bits of the key.
    numbers: tl.tensor,
    shares: tl.tensor,  # (d, V) float64, to be written: of the likeliest one's.
    chosen: tl.tensor,  # (d,)
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    IDS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    scores += row.to(tl.int64) * vocab_size
    shares += row.to(tl.int64) * vocab_size
    own = numbers + row
    temperature, num_kept = tl.load(own), tl.load(own + num_rows)
    dropped, log_min_p = tl.load(own + 2 * num_rows), tl.load(own + 3 * num_rows)
    key = tl.load(own + 4 * num_rows).to(tl.int64, bitcast=True)

    largest = float("-inf")
    for first in range(0, vocab_size, IDS):
        ids = first + tl.arange(0, IDS)
        some = tl.load(scores + ids, ids < vocab_size, float("-inf"))
        largest = tl.maximum(largest, tl.max(some, 0))
    for first in range(0, vocab_size, IDS):
        ids = first + tl.arange(0, IDS)
        some = tl.load(scores + ids, ids < vocab_size, float("-inf"))
        share = tl.exp((some - largest).to(tl.float64) / temperature)
        tl.store(shares + ids, share, ids < vocab_size)
    # Other threads of this program read them.
    tl.debug_barrier()

    farthest = tl.full((), _FORBIDDEN, tl.int32)
    if num_kept < vocab_size:
        limit = vocab_size - num_kept
        farthest = _least_edge(scores, None, largest, farthest, limit, vocab_size, IDS)
    # Of those at the edge, as many as fit into what is dropped are, the first ones first.
    edge, num_dropped = farthest, 0
    if dropped > 0:
        limit = dropped * _beyond(scores, shares, largest, -1, farthest, vocab_size, IDS)
        edge = _least_edge(scores, shares, largest, farthest, limit, vocab_size, IDS)
        rest = limit - _beyond(scores, shares, largest, edge, farthest, vocab_size, IDS)
        share = tl.exp(-edge.to(tl.float32, bitcast=True).to(tl.float64) / temperature)
        num_at_edge = _beyond(scores, None, largest, edge - 1, edge, vocab_size, IDS)
        # One of them stays, whatever is rounded.
        fit = tl.minimum(tl.floor(rest / tl.maximum(share, 1e-300)), num_at_edge - 1)
        num_dropped = tl.maximum(fit, 0.0).to(tl.int32)

    fastest, best, num_passed = tl.full((), -1.0, tl.float64), 0, 0
    for first in range(0, vocab_size, IDS):
        ids = first + tl.arange(0, IDS)
        distances = _distances(scores, largest, first, vocab_size, IDS)
        is_at_edge = (distances == edge).to(tl.int32)
        place = num_passed + tl.cumsum(is_at_edge, 0)
        num_passed += tl.sum(is_at_edge, 0)
        below = -distances.to(tl.float32, bitcast=True).to(tl.float64) / temperature
        is_kept = (distances < edge) | ((distances == edge) & (place > num_dropped))
        is_kept &= (below >= log_min_p) & (ids < vocab_size)
        speed = tl.load(shares + ids, is_kept, 0.0) / _exponentials(key, ids)
        speed = tl.where(is_kept, speed, -1.0)
        top, at = tl.max(speed, 0, return_indices=True)
        best = tl.where(top > fastest, first + at, best)
        fastest = tl.maximum(fastest, top)
    tl.store(chosen + row, best)
