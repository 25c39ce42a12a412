"""Logits → the next ids, for all sequences of a step at once, on the device that has the logits.

Owns   the batched twin of `sampler_reference`, which says what is chosen: the same ids, row by row.
Takes  (R, V) float32 logits, a row for each branch of the sequences that choose.
Never  keeps anything, and waits for the device more than once a step, but for beam searches.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate

import torch
from torch import Tensor

from minigpt4_runtime.engine.row_settings import RowSettings, Want, row_settings
from minigpt4_runtime.engine.sampler_reference import (
    ReferenceSampler,
    likeliest,
    overflow_error,
    takes_the_best,
)
from minigpt4_runtime.engine.scheduler import Choice, Token
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import TokenLogprobs

_FORBIDDEN = float("-inf")


class Sampler:
    """Chooses for every sequence as it asked. Where a device has no float64, the CPU does it."""

    def __init__(self, *, bos_id: int, eos_id: int, has_float64: bool = True) -> None:
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._has_float64 = has_float64
        self._reference = ReferenceSampler(bos_id=bos_id, eos_id=eos_id)

    @torch.inference_mode()
    def pick(self, logits: Tensor, sequences: Many[Sequence]) -> dict[int, Choice | RequestError]:
        """Sequence id → what comes next. Logits that are no numbers are that sequence's error."""
        first_rows = accumulate((len(each.branches) for each in sequences), initial=0)
        placed = list(zip(first_rows, sequences, strict=False))
        wants, found = _wants(placed)
        if wants and not self._has_float64:
            logits = logits.cpu()
        # One number that is none makes a sum none; and sums of logits do not overflow.
        results = [logits.argmax(-1), torch.isfinite(logits.sum(-1))]
        if wants:
            results += self._choose(logits, wants)
        best, is_finite, *chosen = (each.tolist() for each in _fetch(results))
        found |= _tokens(wants, *chosen)
        choices: dict[int, Choice | RequestError] = {}
        for row, each in placed:
            if each.search is not None:
                choices |= self._reference.pick(logits[row : row + len(each.branches)], [each])
            elif not is_finite[row]:
                choices[each.id] = overflow_error()
            else:
                choices[each.id] = found[each.id] if each.id in found else Token(best[row])
        return choices

    def _choose(self, logits: Tensor, wants: Many[Want]) -> list[Tensor]:
        """(n,) ids; for the m rows whose logprobs are wanted, (m, 1 + 2k): own, values and ids."""
        settings = row_settings(
            wants, bos_id=self._bos_id, vocab_size=logits.shape[1], device=logits.device
        )
        scores = logits[settings.rows]
        reported = settings.reported
        logprobs = None if reported is None else scores[reported].log_softmax(-1)
        self._reshape(scores, settings)
        num_drawn = len(settings.temperature)
        chosen = torch.cat((_draw(scores[:num_drawn], settings), scores[num_drawn:].argmax(-1)))
        if logprobs is None:
            return [chosen]
        own = logprobs.gather(1, chosen[reported, None]).double()
        return [chosen, torch.cat((own, *likeliest(logprobs, settings.num_top)), 1)]

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
        if guide := settings.guide:
            scores[guide.rows] = scores[guide.rows].masked_fill(~guide.values, _FORBIDDEN)
        if (rows := settings.unfinished) is not None:
            ends = scores[rows, self._eos_id]
            scores[rows, self._eos_id] = _FORBIDDEN
            # Its form is complete where nothing else may follow.
            is_complete = scores[rows].amax(-1) == _FORBIDDEN
            scores[rows, self._eos_id] = ends.masked_fill(~is_complete, _FORBIDDEN)


def _wants(
    placed: Many[tuple[int, Sequence]],
) -> tuple[list[Want], dict[int, Choice | RequestError]]:
    """The rows that their largest logit does not decide, drawn ones first; and guides' errors."""
    wants = []
    errors: dict[int, Choice | RequestError] = {}
    for row, sequence in placed:
        if takes_the_best(sequence) or sequence.search is not None:
            continue
        guide = sequence.branches[0].guide
        try:
            wants.append(Want(row, sequence, None if guide is None else guide.allowed()))
        except RequestError as error:
            errors[sequence.id] = error
    return sorted(wants, key=lambda want: want.params.temperature == 0), errors


def _draw(scores: Tensor, settings: RowSettings) -> Tensor:
    """(d, V) float32 scores → (d,) ids. -inf is never drawn."""
    # From the largest down and in float64, no temperature is too low: nothing overflows.
    scores = (scores - scores.amax(-1, keepdim=True)).double() / settings.temperature
    if limits := settings.top_k:
        some = scores[limits.rows]
        largest = some.topk(settings.largest_top_k).values
        least = largest.gather(1, limits.values.long() - 1)
        scores[limits.rows] = some.masked_fill(some < least, _FORBIDDEN)
    if limits := settings.dropped_share:
        some = scores[limits.rows]
        # Stable, so that of equals the same are dropped everywhere.
        ascending, order = some.sort(stable=True)
        is_dropped = ascending.softmax(-1).cumsum(-1) <= limits.values
        is_dropped[:, -1] = False
        is_dropped = is_dropped.scatter(1, order, is_dropped)
        scores[limits.rows] = some.masked_fill(is_dropped, _FORBIDDEN)
    if limits := settings.log_min_p:
        # The largest is 0 here: a score is the logarithm of a share of the likeliest one's.
        some = scores[limits.rows]
        scores[limits.rows] = some.masked_fill(some < limits.values, _FORBIDDEN)
    # How torch.multinomial draws: the exponential race.
    return (scores.softmax(-1) / settings.exponentials).argmax(-1)


def _fetch(results: Many[Tensor]) -> list[Tensor]:
    """The same on the host, in one copy: here is the wait for the device."""
    packed = torch.cat([each.flatten() for each in results]).cpu()
    parts = packed.split_with_sizes([each.numel() for each in results])
    return [part.view(each.shape) for part, each in zip(parts, results, strict=True)]


def _tokens(
    wants: Many[Want], ids: Many[float] = (), reports: Many[Many[float]] = ()
) -> dict[int, Token]:
    """What `_choose` gave, by sequence id."""
    unread = iter(reports)
    tokens = {}
    for want, chosen in zip(wants, map(int, ids), strict=True):
        count = want.params.logprobs
        logprobs = None
        if count is not None:
            own, *best = next(unread)
            values, best_ids = best[: len(best) // 2], best[len(best) // 2 :]
            top = tuple(zip(map(int, best_ids), values, strict=True))[:count]
            logprobs = TokenLogprobs(chosen, own, top)
        tokens[want.sequence.id] = Token(chosen, logprobs)
    return tokens
