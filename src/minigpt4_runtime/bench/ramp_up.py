"""The search for the largest batch that meets a limit: doubling, then bisection.

Owns   the order of the tries, and why a search ended.
Takes  a function that tries a batch size; keeps its outcomes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

BatchVerdict = Literal["holds", "latency", "memory"]
BatchLimit = Literal["range", "latency", "memory"]


class Outcome(Protocol):
    """A tried batch size: it meets the limit, is too slow, or runs out of memory."""

    @property
    def verdict(self) -> BatchVerdict:
        """Whether it holds, or why it fails."""


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class RampUp(Generic[T]):
    """The result of a search.

    `batch_size` is the largest that holds, or None if the smallest already fails. `limit` says why
    the next larger size fails; it is "range" if the whole range holds.
    """

    batch_size: int | None
    limit: BatchLimit
    tried: dict[int, T]


def find_largest_batch(try_batch: Callable[[int], T], smallest: int, largest: int) -> RampUp[T]:
    """Search from `smallest` to `largest`, both included. No size is tried twice.

    The result holds and the next larger size does not; if larger batches are never faster, it is
    the largest that holds. For a range of n sizes there are at most 2·log₂ n + 2 tries.
    """
    tried: dict[int, T] = {}

    def verdict(size: int) -> BatchVerdict:
        tried[size] = try_batch(size)
        return tried[size].verdict

    holding, size = None, smallest
    while (limit := verdict(size)) == "holds":
        if size == largest:
            return RampUp(size, "range", tried)
        holding, size = size, min(2 * size, largest)
    while holding is not None and size - holding > 1:
        middle = (holding + size) // 2
        if (found := verdict(middle)) == "holds":
            holding = middle
        else:
            size, limit = middle, found
    return RampUp(holding, limit, tried)
