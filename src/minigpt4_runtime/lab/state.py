"""A search's sequences: B answers to one prompt that grow by ids of the caller's choice.

Owns   their ids, keys and values.
Takes  ids; gives logits.
Never  chooses an id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.lab.attention import Past
from minigpt4_runtime.lab.ids import read_ids
from minigpt4_runtime.lab.keep import Kept


@dataclass(frozen=True)
class Reached:
    """Where sequences stand: (B, V) logits of the next id, what the last pass kept, their past."""

    logits: Tensor
    kept: Kept
    past: Past


# (B, n) ids behind a past → where that leads.
Advance = Callable[[Tensor, Past], Reached]


class State:
    """B answers that grow side by side. `Lab.start` makes one.

    `ids` (B, n) are what was stepped so far; `logits` (B, V) are of the next id. `hidden` and
    `attention` are what the last pass kept: the prompt's, or the last step's.
    """

    def __init__(self, advance: Advance, prompt: Reached, ids: Tensor) -> None:
        self._advance = advance
        self._prompt = self._now = prompt
        self.ids = ids

    @property
    def logits(self) -> Tensor:
        """(B, V), at least float32."""
        return self._now.logits

    @property
    def hidden(self) -> Tensor | None:
        """(kept, B, Q, C) of the last pass; see `Keep`."""
        return self._now.kept.hidden

    @property
    def attention(self) -> Tensor | None:
        """(kept, B, H, Q, T) of the last pass; see `Keep`."""
        return self._now.kept.attention

    @torch.no_grad()
    def step(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Let each answer go on by an id of (B,), or by several of (B, n): the next logits (B, V).

        Raises:
            RequestError: they are not as many as there are answers, or outside the vocabulary.
            PromptTooLongError: the model's context is full.
        """
        given = read_ids(ids, self.logits.shape[-1], self.ids.device)
        given = given[:, None] if given.dim() == 1 else given
        if len(given) != len(self.ids) or given.shape[1] == 0:
            raise RequestError(
                f"ids are {tuple(given.shape)}; there are {len(self.ids)} answers, so give "
                f"({len(self.ids)},) or ({len(self.ids)}, n)."
            )
        self._now = self._advance(given, self._now.past)
        self.ids = torch.cat([self.ids, given], 1)
        return self.logits

    @torch.no_grad()
    def fork(self, rows: int | Sequence[int]) -> State:
        """Another state that goes on from these of the answers, with repeats if you like.

        This one stays as it is.
        """
        rows = [rows] if isinstance(rows, int) else list(rows)
        if not rows or not all(0 <= row < len(self.ids) for row in rows):
            raise RequestError(f"rows are {rows}; the answers are 0 to {len(self.ids) - 1}.")
        # The past of a prompt is the beginning of the past of now: one copy is enough.
        now = self._now
        past = now.past.select(rows)
        other = State(
            self._advance,
            _of_rows(self._prompt, rows, past.first(self._prompt.past.length)),
            self.ids[rows],
        )
        other._now = other._prompt if now is self._prompt else _of_rows(now, rows, past)
        return other

    @torch.no_grad()
    def rollback(self, count: int) -> None:
        """Take back the last ids of each answer: their keys and values are let go.

        The last id that stays is computed once more, for its logits; nothing else is.
        """
        length = self.ids.shape[1]
        if not 0 <= count <= length:
            raise RequestError(f"rollback({count}): the answers have {length} ids each.")
        if count == 0:
            return
        self.ids = self.ids[:, : length - count]
        if count == length:
            self._now = self._prompt
            return
        before = self._now.past.first(self._prompt.past.length + length - count - 1)
        self._now = self._advance(self.ids[:, -1:], before)


def _of_rows(reached: Reached, rows: Sequence[int], past: Past) -> Reached:
    return Reached(reached.logits[list(rows)], reached.kept.select(rows), past)
