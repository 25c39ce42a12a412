"""Counting that reports share: means of pairs and how sure they are, rates, and samples.

Owns   what wins, ties and losses are, the interval around a mean, and which pictures a seed draws.
Takes  numbers and names; gives numbers and names.
Never  reads a file or knows a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy

NUM_RESAMPLES = 10_000
_MAX_DRAWN = 2**22  # Numbers held at once while resampling.


@dataclass(frozen=True)
class PairedComparison:
    """How much higher one side scores than the other on the same things.

    `low` and `high` bound the mean difference with 95 % confidence.
    """

    wins: int
    ties: int
    losses: int
    mean_difference: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float], *, seed: int = 0) -> PairedComparison:
        """Compare by the differences of at least one pair."""
        wins = sum(difference > 0 for difference in differences)
        losses = sum(difference < 0 for difference in differences)
        low, high = bootstrap_interval(differences, seed=seed)
        mean = float(numpy.mean(differences))
        return cls(wins, len(differences) - wins - losses, losses, mean, low, high)


def bootstrap_interval(
    values: Sequence[float],
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bound the mean of what `values` are a sample of, by the percentile bootstrap (Efron, 1979).

    So many times as many values are drawn with replacement; the bounds cut off equal shares of
    their means. The same seed gives the same bounds on every machine.
    """
    sample = numpy.asarray(values, dtype=numpy.float64)
    # Unlike its successors, RandomState promises that its stream never changes.
    random = numpy.random.RandomState(seed)
    at_once = max(1, _MAX_DRAWN // len(sample))
    means = [
        sample[random.randint(0, len(sample), (count, len(sample)), dtype=numpy.int64)].mean(axis=1)
        for first in range(0, num_resamples, at_once)
        if (count := min(at_once, num_resamples - first))
    ]
    tail = (1 - confidence) / 2
    low, high = numpy.quantile(numpy.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def draw_sample(names: Collection[str], size: int, *, seed: int) -> list[str]:
    """Draw that many names by lot, or all if there are fewer, in sorted order.

    A name's lot is a digest of seed and file name: the same everywhere, whatever else is in the
    hat. Folders count only among files of one name, from the last folder on.
    """
    lots = sorted(names, key=lambda name: (_lots(name, seed), name))
    return sorted(lots[:size])


def _lots(name: str, seed: int) -> list[bytes]:
    parts = name.split("/")
    return [_lot("/".join(parts[first:]), seed) for first in reversed(range(len(parts)))]


def _lot(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
