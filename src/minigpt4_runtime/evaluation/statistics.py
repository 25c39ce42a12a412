"""Statistics that reports share: paired comparisons and random samples.

Owns   the definition of wins, ties and losses, the interval around a mean, and the drawing of
       samples.
Takes  numbers and names; gives numbers and names.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Self

import numpy

NUM_RESAMPLES = 10_000
_MAX_DRAWN = 2**22  # Numbers held at once while resampling.


@dataclass(frozen=True)
class PairedComparison:
    """The difference between two sides' scores on the same items.

    `low` and `high` bound the mean difference with 95 % confidence.
    """

    wins: int
    ties: int
    losses: int
    mean_difference: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Self:
        """Compare by the differences of at least one pair."""
        wins = sum(difference > 0 for difference in differences)
        losses = sum(difference < 0 for difference in differences)
        low, high = bootstrap_interval(differences)
        mean = float(numpy.mean(differences))
        return cls(wins, len(differences) - wins - losses, losses, mean, low, high)


def bootstrap_interval(
    values: Sequence[float],
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bound the mean of the population of `values` by the percentile bootstrap (Efron, 1979).

    Resamples of the same size are drawn with replacement, and the bounds are quantiles of their
    means. The same seed gives the same bounds on every machine.
    """
    sample = numpy.asarray(values, dtype=numpy.float64)
    # Unlike newer generators, RandomState guarantees that its stream never changes.
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
    """Draw `size` names at random, or all if there are fewer, in sorted order.

    Names are ordered by a digest of seed and file name, which does not depend on the other names.
    Among equal file names the folders decide, from the last one on.
    """

    def lots(name: str) -> list[bytes]:
        parts = name.split("/")
        ends = ["/".join(parts[first:]) for first in reversed(range(len(parts)))]
        return [sha256(f"{seed}:{end}".encode("utf-8", "surrogatepass")).digest() for end in ends]

    return sorted(sorted(names, key=lambda name: (lots(name), name))[:size])
