"""Beam search: which of the likeliest continuations go on, and which are finished answers.

Owns   the scores, as transformers 4.30's BeamSearchScorer computes them with early_stopping off
       (generation/beam_search.py): a sum of log-probabilities over length ** length_penalty,
       where the length counts the leading BOS and not the end id.
Takes  the best 2·num_beams continuations of a step; gives those that go on.
Never  touches a tensor, a block or a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minigpt4_runtime.messages import FinishReason


class Continuation(NamedTuple):
    """A branch and one more id, with the sum of log-probabilities they come to."""

    score: float
    branch: int
    token_id: int


@dataclass(frozen=True)
class Hypothesis:
    """A finished answer. Its ids include the one that ended it."""

    score: float
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class BeamSearch:
    """The finished answers of one request, at most `num_beams`, and when none can be better."""

    def __init__(self, num_beams: int, length_penalty: float, max_new_tokens: int) -> None:
        self._num_beams = num_beams
        self._length_penalty = length_penalty
        self._max_new_tokens = max_new_tokens
        self._finished: list[Hypothesis] = []
        self.is_done = False

    def choose(
        self,
        continuations: Sequence[Continuation],
        answers: Sequence[Sequence[int]],
        ends: Callable[[Continuation], bool],
    ) -> list[Continuation]:
        """Separate finished answers from those that go on; `continuations` come best first.

        `answers` are the branches' ids so far. An end beyond the best `num_beams` does not count.
        """
        going_on: list[Continuation] = []
        for rank, each in enumerate(continuations):
            if ends(each):
                if rank < self._num_beams:
                    answer = answers[each.branch]
                    # Like upstream's, the length does not count the id that ends the answer.
                    self._finish(each.score, 1 + len(answer), (*answer, each.token_id), "stop")
            else:
                going_on.append(each)
            if len(going_on) == self._num_beams:
                break
        num_new = len(answers[0]) + 1
        self.is_done = not going_on or self._cannot_improve(continuations[0].score, 1 + num_new)
        if not self.is_done and num_new == self._max_new_tokens:
            for each in going_on:
                ids = (*answers[each.branch], each.token_id)
                self._finish(each.score, 1 + num_new, ids, "length")
            self.is_done = True
        return going_on

    def best(self) -> Hypothesis:
        """The finished answer with the highest score; of equals the last one."""
        return max(reversed(self._finished), key=lambda each: each.score)

    def _finish(
        self, score: float, length: int, token_ids: tuple[int, ...], reason: FinishReason
    ) -> None:
        score /= float(length) ** self._length_penalty
        if len(self._finished) < self._num_beams or score > self._worst_score():
            self._finished.append(Hypothesis(score, token_ids, reason))
            if len(self._finished) > self._num_beams:
                self._finished.remove(min(self._finished, key=lambda each: each.score))

    def _worst_score(self) -> float:
        return min(each.score for each in self._finished)

    def _cannot_improve(self, best_sum: float, length: int) -> bool:
        if len(self._finished) < self._num_beams:
            return False
        return bool(self._worst_score() >= best_sum / float(length) ** self._length_penalty)
