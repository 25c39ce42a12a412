"""Repeated measurements, summarised.

Owns   the definitions of mean, percentiles and noise.
Takes  plain numbers.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy

P = TypeVar("P", covariant=True)


@dataclass(frozen=True)
class Measured(Generic[P]):
    """A point of a report, and each try's value of the times that reports compare."""

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
    """Mean and percentiles of at least one value."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Take the mean and three percentiles, by linear interpolation.

        Example: of 1, 2, 10 the median is 2, and the percentile of 0.9 is 8.4.
        """
        return cls(statistics.fmean(values), *numpy.quantile(values, (0.5, 0.9, 0.99)).tolist())


def noise(values: Sequence[float]) -> float | None:
    """Half the range as a share of the median (0.02 is ± 2 %); None for a single value."""
    middle = statistics.median(values)
    if len(values) < 2 or not middle:
        return None
    return (max(values) - min(values)) / 2 / middle
