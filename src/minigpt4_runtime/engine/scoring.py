"""The log-probabilities of given answers, some of them side by side at a time.

Owns   which candidates of a request are computed now, and what is known of each.
Takes  a log-probability for each id that was asked about; gives their sums.
Never  sees a logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """The log-probabilities of the ids that a step was asked about, in the order of its rows."""

    logprobs: tuple[float, ...]


class Scoring:
    """The candidates of one request, in rounds of at most `at_once`.

    An id of a candidate is told by the row before it: the prompt's last for the first one.
    """

    def __init__(self, candidates: tuple[tuple[int, ...], ...], at_once: int) -> None:
        self.at_once = min(at_once, len(candidates))
        self._candidates = candidates
        self._first = 0  # Of this round.
        self._logprobs = [[math.nan] * len(each) for each in candidates]
        # What the last plan asks about: candidate, first id and number of ids, in order.
        self._asked: list[tuple[int, int, int]] = []

    @property
    def round(self) -> tuple[tuple[int, ...], ...]:
        """The candidates of this round."""
        return self._candidates[self._first : self._first + self.at_once]

    def plan(self, spans: Many[tuple[int, int, int]]) -> None:
        """Note what a step asks about: the place in the round, the first id, how many ids."""
        self._asked = [(self._first + place, first, count) for place, first, count in spans]

    @property
    def targets(self) -> list[int]:
        """The ids that the last plan asks about, one for each of its rows."""
        return [
            token_id
            for place, first, count in self._asked
            for token_id in self._candidates[place][first : first + count]
        ]

    def take(self, scored: Scored) -> None:
        """Note what was found. After a preemption it is found again."""
        found = iter(scored.logprobs)
        for place, first, count in self._asked:
            self._logprobs[place][first : first + count] = [next(found) for _ in range(count)]

    def begin_next_round(self) -> bool:
        """Go on with the next candidates; False where there are none."""
        self._first += self.at_once
        return self._first < len(self._candidates)

    @property
    def sums(self) -> tuple[float, ...]:
        """The log-probability of each candidate."""
        return tuple(map(math.fsum, self._logprobs))
