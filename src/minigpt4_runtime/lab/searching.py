"""Answers that grow under functions of a user's: logits in, logits out, with other prompts beside.

Owns   the loop from logits to an answer, and its end as the engine ends one.
Takes  states of a prompt and of its branches; gives answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.lab.ids import read_ids
from minigpt4_runtime.lab.state import State
from minigpt4_runtime.messages import FinishReason
from minigpt4_runtime.text.answer import AnswerText


@dataclass(frozen=True)
class Seen:
    """What a processor sees at a step of B answers.

    `ids` (B, n) so far, `logits` (B, V) as the processors before have left them, `hidden` and
    `attention` as kept of the last pass, and each branch's logits (B, V) by its name.
    """

    ids: Tensor
    logits: Tensor
    hidden: Tensor | None
    attention: Tensor | None
    branches: Mapping[str, Tensor]


# What is seen → (B, V) logits that take the place of `seen.logits`.
Processor = Callable[[Seen], Tensor]
# (B, V) logits → (B,) ids.
Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """A finished answer, with all its ids, the one that ended it included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def greedy(logits: Tensor) -> Tensor:
    """(B, V) → (B,): the likeliest ids."""
    return logits.argmax(-1)


_NO_ID_LEFT = (
    "The processors left no id to choose: the largest logit is -inf, inf or NaN. Leave at least "
    "one id a finite logit."
)
_NO_NUMBERS = (
    "The model's largest logit is NaN, inf or -inf. Look for such numbers in the pixels or rows "
    "that were given, in hooks and in edited weights, or load it in bfloat16 or float32."
)


@torch.no_grad()
def search(
    states: Mapping[str, State],
    texts: Sequence[AnswerText],
    *,
    processors: Sequence[Processor],
    choose: Choose,
    max_new_tokens: int,
    eos_id: int,
) -> list[Answer]:
    """Let the answers of the state "" grow; those of the other states get the same ids.

    Raises:
        RequestError: a processor gives no logits, the processors leave no id, `choose` gives other
            ids than one for each answer, or the model's own logits are no numbers.
    """
    main = states[""]
    branches = {name: state for name, state in states.items() if name}
    growing = [Growing(text, eos_id) for text in texts]
    for count in range(1, max_new_tokens + 1):
        logits = main.logits
        for process in processors:
            others = {name: state.logits for name, state in branches.items()}
            seen = Seen(main.ids, logits, main.hidden, main.attention, others)
            logits = _checked(process, process(seen), main.logits.shape)
        if not logits.amax(-1).isfinite().all():
            is_model_right = bool(main.logits.amax(-1).isfinite().all())
            raise RequestError(_NO_ID_LEFT if is_model_right else _NO_NUMBERS)
        ids = read_ids(choose(logits), logits.shape[-1], logits.device)
        if ids.shape != logits.shape[:1]:
            raise RequestError(
                f"choose gave ids of {tuple(ids.shape)}. Return one for each of {len(logits)} "
                f"answers, ({len(logits)},)."
            )
        for each, token_id in zip(growing, ids.tolist(), strict=True):
            each.feed(token_id)
        if all(each.is_done for each in growing) or count == max_new_tokens:
            break
        for state in states.values():
            state.step(ids)
    return [each.answer() for each in growing]


def _checked(process: Processor, made: object, shape: torch.Size) -> Tensor:
    """What a processor gave, if it is logits."""
    if not isinstance(made, Tensor):
        found: object = type(made).__name__
    elif made.is_complex():
        found = "complex numbers"
    elif made.shape != shape:
        found = tuple(made.shape)
    else:
        return made
    raise RequestError(
        f"The processor {getattr(process, '__qualname__', repr(process))} gave {found}. Return the "
        f"logits, a tensor of {tuple(shape)}."
    )


class Growing:
    """One answer; ids that come after its end are not heard."""

    def __init__(self, text: AnswerText, eos_id: int) -> None:
        self._text, self._eos_id = text, eos_id
        self._ids: list[int] = []
        self.is_done = False

    def feed(self, token_id: int) -> None:
        """Take one more id."""
        if not self.is_done:
            self._ids.append(token_id)
            self._text.feed(token_id)
            self.is_done = token_id == self._eos_id or self._text.stopped

    def answer(self) -> Answer:
        """What was heard, at the end."""
        self._text.finish()
        return Answer(self._text.reply, tuple(self._ids), "stop" if self.is_done else "length")
