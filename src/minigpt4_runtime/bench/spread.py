"""Many measurements of one thing → the few numbers that people compare.

Owns   mean, percentiles and noise, and what each of them means.
Takes  plain numbers. Never reads a clock.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

P = TypeVar("P", covariant=True)


@dataclass(frozen=True)
class Measured(Generic[P]):
    """A point of a report, and for what is compared between reports each try's own number."""

    point: P
    tries: Mapping[str, Sequence[float]]

    def as_text(self) -> str:
        """One line."""
        return str(self.point)

    def as_mapping(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dataclasses.asdict(self.point), "tries": dict(self.tries)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Spread:
    """Of at least one value."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take the mean and three percentiles."""
        mean = statistics.fmean(values)
        return cls(mean, *(percentile(values, share) for share in (0.5, 0.9, 0.99)))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all lie; between two of them on the straight line.

    Example: the median of 1, 2, 10 is 2, and 0.9 of them lie below 8.4.
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    index = min(int(place), max(0, len(ordered) - 2))
    low, high = ordered[index], ordered[min(index + 1, len(ordered) - 1)]
    return low + (high - low) * (place - index)


def noise(values: Sequence[float]) -> float | None:
    """Half the distance from lowest to highest, as a share of the median: 0.02 is ± 2 %.

    None where a single value cannot tell.
    """
    middle = statistics.median(values)
    if len(values) < 2 or not middle:
        return None
    return (max(values) - min(values)) / 2 / middle
