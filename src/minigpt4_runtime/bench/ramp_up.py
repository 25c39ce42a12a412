"""The largest batch that holds a limit, in few tries: doubling, then bisection.

Owns   the order of the tries, and why a search ended.
Takes  a function that tries a batch size; keeps whatever it gives.
Never  knows what is tried, or what holding means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

Verdict = Literal["holds", "latency", "memory"]
Limit = Literal["range", "latency", "memory"]


class Outcome(Protocol):
    """One batch size that was tried: it holds, or it fails by its latency or for want of memory."""

    @property
    def verdict(self) -> Verdict:
        """How it went."""
        ...


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class RampUp(Generic[T]):
    """What a search found.

    `batch_size` is the largest that holds, None where not even the smallest does; `limit` is what
    the next larger one fails by, and "range" where there is none in the range.
    """

    batch_size: int | None
    limit: Limit
    tried: dict[int, T]


def find_largest_batch(try_batch: Callable[[int], T], smallest: int, largest: int) -> RampUp[T]:
    """Search from `smallest` to `largest`, both included. No size is tried twice.

    Where larger batches are never faster, the result is the largest that holds; in any case it
    holds itself and the next larger one does not. Of a range of n sizes at most 2·log₂ n + 2 are
    tried.
    """
    tried: dict[int, T] = {}

    def failure(size: int) -> Limit | None:
        tried[size] = try_batch(size)
        verdict = tried[size].verdict
        return None if verdict == "holds" else verdict

    holding, size = None, smallest
    while (limit := failure(size)) is None:
        holding = size
        if size == largest:
            return RampUp(size, "range", tried)
        size = min(2 * size, largest)
    if holding is None:
        return RampUp(None, limit, tried)
    failing = size
    while failing - holding > 1:
        middle = (holding + failing) // 2
        if (reason := failure(middle)) is None:
            holding = middle
        else:
            failing, limit = middle, reason
    return RampUp(holding, limit, tried)
