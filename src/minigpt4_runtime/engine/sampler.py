"""Logits → the next ids, for all sequences of a step at once, on the device that has the logits.

Owns   the order of the steps, which is that of transformers, with OpenAI's penalties beside the
       one of repetition, as in vLLM: a caller's processors, logit bias, penalties of repetition,
       presence and frequency, the guide, forbidden end, temperature, top-k, top-p, min-p. Beam
       searches, and the log-probabilities of given ids.
Takes  (R, V) float32 logits, a row for each branch of the sequences that choose, and for each id
       that is scored.
Never  keeps state: a draw depends on a request's seed and the number of the token, so an answer is
       the same alone, in any batch and after a pause. Never waits for the device more than once a
       step, when the choices are read, except for beam searches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.engine.beam import Continuation
from minigpt4_runtime.engine.drawing import FORBIDDEN, TORCH_CHOICE, forbid
from minigpt4_runtime.engine.row_settings import RowSettings, Want, row_settings
from minigpt4_runtime.engine.scheduler import NextTokens, Token
from minigpt4_runtime.engine.scoring import Scored
from minigpt4_runtime.engine.sequence import Branch, Sequence
from minigpt4_runtime.engine.steering import no_choice_error, steer
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.kernels.contracts import RowChoice
from minigpt4_runtime.messages import TokenLogprobs

# The states of a row: its processors leave no id, its logits are not finite, or nothing is wrong.
_NO_CHOICE, _OVERFLOWED, _FINE = -1, 0, 1


@dataclass(frozen=True)
class Choices:
    """What the sequences of a step choose, as the device finds it.

    `ids` are those of each row, on the device; of a beam search they mean nothing. `read` waits for
    them, and gives the choice of each sequence by its id.
    """

    ids: Tensor  # (R,)
    read: Callable[[], dict[int, NextTokens | RequestError]]


class _Asked(NamedTuple):
    """What a step chooses for: all its sequences, behind their first rows, and what some want."""

    placed: Many[tuple[int, Sequence]]
    wants: Many[Want]
    scored: Many[tuple[int, Sequence]]
    errors: Mapping[int, RequestError]


class Sampler:
    """Chooses by each sequence's settings. The CPU does it for a device without float64.

    With `runs_ahead`, choices can be read while the device does later work. `choice` takes ids
    from rows where torch's own operations are not the fastest.
    """

    def __init__(
        self,
        *,
        bos_id: int,
        eos_id: int,
        has_float64: bool = True,
        runs_ahead: bool = False,
        choice: RowChoice | None = None,
    ) -> None:
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._has_float64 = has_float64
        self._runs_ahead = runs_ahead
        self._choice = choice or TORCH_CHOICE

    def pick(
        self, logits: Tensor, sequences: Many[Sequence]
    ) -> dict[int, NextTokens | RequestError]:
        """Sequence id → its choice, where each sequence has a row for each of its branches."""
        first_rows = accumulate((each.num_rows for each in sequences), initial=0)
        return self.start(logits, list(zip(first_rows, sequences, strict=False))).read()

    @torch.inference_mode()
    def start(self, logits: Tensor, placed: Many[tuple[int, Sequence]]) -> Choices:
        """Let these choose, each from its first row on. Non-finite logits fail one sequence alone.

        The logits must stay as they are until they are read if there are beam searches.
        """
        best = self._choice.best(logits)
        wants, found = _wants(placed)
        others = [each for each in placed if not each[1].is_plain]
        steered = [each for each in others if each[1].request.processors]
        if steered:
            logits, failed = steer(logits, steered)
            found |= failed
            is_left = torch.isfinite(_best_left(logits, wants))
            states = torch.where((best[1] == _FINE) & ~is_left, _NO_CHOICE, best[1])
            best = torch.stack((logits.argmax(-1), states))
        if wants and not self._has_float64:
            logits = logits.cpu()
            best = best.to(logits.device)
        ids = best[0]
        results = [best.flatten()]
        scored = [each for each in others if each[1].scoring]
        if scored:
            results.append(_score(logits, scored))
        if wants:
            rows, *chosen = self._choose(logits, wants)
            results += chosen
            ids = ids.index_copy(0, rows, chosen[0])
        numbers = torch.cat(results) if len(results) > 1 else results[0]
        fetched = _fetch(numbers) if self._runs_ahead else numbers.tolist
        asked = _Asked(placed, wants, scored, found)
        return Choices(ids, partial(self._read, fetched, logits, asked))

    @torch.inference_mode()
    def _read(
        self, fetched: Callable[[], list[float]], logits: Tensor, asked: _Asked
    ) -> dict[int, NextTokens | RequestError]:
        numbers, count = fetched(), len(logits)
        best, states = numbers[:count], numbers[count : 2 * count]
        rest = iter(numbers[2 * count :])
        found: dict[int, NextTokens | RequestError] = {
            each.id: Scored(tuple(islice(rest, each.num_rows))) for _, each in asked.scored
        }
        found |= _tokens(asked.wants, list(rest))
        found |= asked.errors
        if states.count(_FINE) < count:
            found |= _troubles(states, asked.placed)
        choices: dict[int, NextTokens | RequestError] = {}
        for row, each in asked.placed:
            if each.id in found:
                choices[each.id] = found[each.id]
            elif each.search is not None:
                rows = logits[row : row + each.num_rows]
                choices[each.id] = self._continue_beams(rows, each)
            else:
                choices[each.id] = Token(int(best[row]))
        return choices

    def _choose(self, logits: Tensor, wants: Many[Want]) -> list[Tensor]:
        """Which n rows; and for `_tokens` n ids; own, values and ids of each row reported."""
        settings = self._settings(wants, logits)
        scores = logits.index_select(0, settings.rows)
        reported = settings.reported
        logprobs = None if reported is None else scores[reported].log_softmax(-1)
        self._reshape(scores, settings)
        chosen = scores[settings.num_drawn :].argmax(-1)
        if settings.lots is not None:
            drawn = self._choice.draw(scores[: settings.num_drawn], settings.lots)
            chosen = torch.cat((drawn, chosen))
        if logprobs is None:
            return [settings.rows, chosen]
        own = logprobs.gather(1, chosen[reported, None]).double()
        return [
            settings.rows,
            chosen,
            torch.cat((own, *likeliest(logprobs, settings.num_top)), 1).flatten(),
        ]

    def _continue_beams(
        self, logits: Tensor, sequence: Sequence
    ) -> list[Continuation] | RequestError:
        """The best 2·num_beams continuations of all branches. Upstream scores log-probabilities."""
        scores = logits.float().cpu().log_softmax(-1)
        try:
            wants = [_want(row, sequence, each) for row, each in enumerate(sequence.branches)]
        except RequestError as error:
            return error
        self._reshape(scores, self._settings(wants, scores))
        sums = scores + torch.tensor([[branch.score] for branch in sequence.branches])
        best = sums.flatten().topk(min(2 * sequence.max_branches, sums.numel()))
        found = [
            Continuation(score, *divmod(index, sums.shape[1]))
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if score > FORBIDDEN
        ]
        return found or no_choice_error()

    def _settings(self, wants: Many[Want], logits: Tensor) -> RowSettings:
        return row_settings(
            wants, bos_id=self._bos_id, vocab_size=logits.shape[1], device=logits.device
        )

    def _reshape(self, scores: Tensor, settings: RowSettings) -> None:
        """All steps that can change which id is the likeliest, in place."""
        if spots := settings.bias:
            scores[spots.rows, spots.ids] += spots.values
        if spots := settings.repetition:
            before = scores[spots.rows, spots.ids]
            scores[spots.rows, spots.ids] = torch.where(
                before < 0, before * spots.values, before / spots.values
            )
        if spots := settings.said:
            scores[spots.rows, spots.ids] -= spots.values
        forbid(scores, settings.guide, lambda _, allowed: ~allowed)
        if (rows := settings.unfinished) is not None:
            ends = scores[rows, self._eos_id]
            scores[rows, self._eos_id] = FORBIDDEN
            # If no other id may follow, the form is complete.
            is_complete = scores.index_select(0, rows).amax(-1) == FORBIDDEN
            scores[rows, self._eos_id] = ends.masked_fill(~is_complete, FORBIDDEN)


def _fetch(numbers: Tensor) -> Callable[[], list[float]]:
    """Start to copy numbers to the host. The result waits for them, not for any later work."""
    if numbers.is_cpu:
        return numbers.tolist
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.accelerator.current_stream(numbers.device).record_event()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def _wants(
    placed: Many[tuple[int, Sequence]],
) -> tuple[list[Want], dict[int, RequestError]]:
    """The rows that need more than their largest logit, drawn ones first; and guides' errors."""
    wants = []
    errors: dict[int, RequestError] = {}
    for row, sequence in placed:
        if takes_the_best(sequence) or sequence.search is not None or sequence.scoring is not None:
            continue
        try:
            wants.append(_want(row, sequence, sequence.branches[0]))
        except RequestError as error:
            errors[sequence.id] = error
    return sorted(wants, key=lambda want: want.params.temperature == 0), errors


def _troubles(states: Many[float], placed: Many[tuple[int, Sequence]]) -> dict[int, RequestError]:
    """The errors of the sequences that have a row in which something is wrong."""
    errors = {}
    for row, each in placed:
        found = states[row : row + each.num_rows]
        if _OVERFLOWED in found:
            errors[each.id] = overflow_error()
        elif _NO_CHOICE in found:
            errors[each.id] = no_choice_error()
    return errors


def _best_left(logits: Tensor, wants: Many[Want]) -> Tensor:
    """The largest logit of each row (R,): where processors meet a guide, of those it allows."""
    best = logits.amax(-1)
    for want in wants:
        if want.allowed is not None and want.sequence.request.processors:
            allowed = send(torch.from_numpy(want.allowed), logits.device)
            best[want.row] = logits[want.row].masked_fill(~allowed, FORBIDDEN).amax()
    return best


def _score(logits: Tensor, placed: Many[tuple[int, Sequence]]) -> Tensor:
    """The log-probabilities (n,) of the ids that are scored, in the order of their rows."""
    asked = [
        (row + number, target)
        for row, each in placed
        for number, target in enumerate(each.scoring.targets if each.scoring else ())
    ]
    rows, targets = send(torch.tensor(asked), logits.device).unbind(1)
    logprobs = logits.index_select(0, rows).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0]


def _want(row: int, sequence: Sequence, branch: Branch) -> Want:
    return Want(row, sequence, branch, branch.guide.allowed() if branch.guide else None)


def _tokens(wants: Many[Want], numbers: Many[float]) -> dict[int, Token]:
    """The result of `_choose`, on the host, by sequence id."""
    ids, reports = numbers[: len(wants)], numbers[len(wants) :]
    num_reported = sum(each.params.logprobs is not None for each in wants)
    width = len(reports) // max(num_reported, 1)
    tokens, start = {}, 0
    for want, chosen in zip(wants, map(int, ids), strict=True):
        count, logprobs = want.params.logprobs, None
        if count is not None:
            own, *best = reports[start : start + width]
            values, best_ids = best[: width // 2], map(int, best[width // 2 :])
            top = tuple(zip(best_ids, values, strict=True))[:count]
            logprobs = TokenLogprobs(chosen, own, top)
            start += width
        tokens[want.sequence.id] = Token(chosen, logprobs)
    return tokens


def takes_the_best(sequence: Sequence) -> bool:
    """Whether the sequence takes the largest logit, since no setting changes which one it is."""
    params = sequence.request.sampling
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and params.presence_penalty == params.frequency_penalty == 0
        and not params.logit_bias
        and sequence.request.guide is None
        and params.num_beams == 1
        and params.logprobs is None
        and params.min_new_tokens <= len(sequence.branches[0].answer)
    )


def overflow_error() -> RequestError:
    """The error of a sequence with non-finite logits."""
    return RequestError(
        "The model's numbers overflowed for this input. Load it with dtype bfloat16 or float32 "
        "instead."
    )


def likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(…, V) → the `count` largest, and their ids. Of equals the smaller id first.

    topk alone orders equals by the device and by the number of rows.
    """
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    # No logprob is above 0: the larger its bits without a sign are, the less likely it is.
    keys = (logprobs.abs().view(torch.int32).long() << 32) + ids
    best = keys.topk(min(count, len(ids)), largest=False).values & 0xFFFFFFFF
    return logprobs.gather(-1, best), best
