"""Functions of a caller's between the logits of a step and the sampler.

Owns   what such a function sees, the batching of requests that have the same functions, and the
       errors of those that fail.
Takes  (R, V) logits of a step and its sequences; gives logits of the same shape.
Never  changes the logits of a request without such functions, nor in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.errors import RequestError

_Placed = tuple[int, Sequence]


@dataclass(frozen=True, eq=False)
class NextLogits:
    """What a processor sees: B answers in progress, of one request or of several.

    `logits` (B, V) are as the processors before have left them; `branches` has those of each other
    prompt, (B, V) float32 too, by its name. The tensors are the processor's own.
    """

    logits: Tensor
    branches: Mapping[str, Tensor]
    answers: tuple[tuple[int, ...], ...]

    @cached_property
    def ids(self) -> tuple[Tensor, ...]:
        """The ids of each answer so far: B tensors of (n,), each with its own n."""
        return tuple(_numbers(each, self.logits.device) for each in self.answers)


# What is seen → (B, V) logits in its place. An answer's depend on what is seen of it alone, and on
# no call before: a step that ran out of memory is computed again.
LogitsProcessor = Callable[[NextLogits], Tensor]


def steer(logits: Tensor, placed: Many[_Placed]) -> tuple[Tensor, dict[int, RequestError]]:
    """Let processors change the logits of their requests; and the errors of those that failed.

    `placed` are sequences that have some, behind their first rows. Requests with the same
    processors and names of branches are given to these together.
    """
    groups: dict[tuple[object, ...], list[_Placed]] = {}
    for row, sequence in placed:
        request = sequence.request
        names = [each.name for each in request.beside]
        groups.setdefault((*map(id, request.processors), *names), []).append((row, sequence))
    changes: list[tuple[list[int], Tensor]] = []
    errors: dict[int, RequestError] = {}
    for group in groups.values():
        try:
            changes.append(_process(logits, group))
            continue
        except RequestError as error:
            if len(group) == 1:
                errors[group[0][1].id] = error
                continue
        # One of them is at fault: the others must not feel it.
        for each in group:
            try:
                changes.append(_process(logits, [each]))
            except RequestError as error:
                errors[each[1].id] = error
    if not changes:
        return logits, errors
    rows = _numbers([row for some, _ in changes for row in some], logits.device)
    return logits.index_copy(0, rows, torch.cat([made for _, made in changes])), errors


def _process(logits: Tensor, group: Many[_Placed]) -> tuple[list[int], Tensor]:
    """The rows of a group's answers, and their new logits."""
    request = group[0][1].request
    rows = [row + number for row, each in group for number in range(len(each.answers))]
    others = {
        other.name: logits.index_select(
            0, _numbers([row + number for row, _ in group], logits.device)
        )
        for number, other in enumerate(request.beside, start=1)
    }
    answers = tuple(tuple(branch.answer) for _, each in group for branch in each.answers)
    own = logits.index_select(0, _numbers(rows, logits.device))
    seen = NextLogits(own, others, answers)
    for process in request.processors:
        name = getattr(process, "__qualname__", repr(process))
        try:
            made = process(seen)
            if is_real := isinstance(made, Tensor) and not made.is_complex():
                made = made.to_dense().to(logits)
        # SystemExit too would end the engine's thread, and all that wait for it would wait forever.
        except BaseException as error:
            raise RequestError(
                f"The processor {name} failed ({type(error).__name__}: {error})."
            ) from error
        wanted = tuple(seen.logits.shape)
        if not is_real or tuple(made.shape) != wanted:
            raise RequestError(
                f"The processor {name} gave {_kind(made)}. Return the logits, a tensor of {wanted}."
            )
        seen = replace(seen, logits=made)
    return rows, seen.logits


def _numbers(values: Many[int], device: torch.device) -> Tensor:
    return send(torch.tensor(values, dtype=torch.long), device)


def _kind(made: object) -> object:
    if not isinstance(made, Tensor):
        return type(made).__name__
    return "complex numbers" if made.is_complex() else tuple(made.shape)


def no_choice_error() -> RequestError:
    """The error of a request whose processors leave no id to choose."""
    return RequestError(
        "The processors left no id to choose: the largest logit is -inf, inf or NaN. Leave at "
        "least one id a finite logit."
    )
