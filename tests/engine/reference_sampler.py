"""The definition that the sampler is held to: one sequence after the other, on the CPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Many

import numpy
import torch
from torch import Tensor

from minigpt4_runtime.engine.beam import Continuation
from minigpt4_runtime.engine.row_settings import lot_of
from minigpt4_runtime.engine.sampler import likeliest, overflow_error
from minigpt4_runtime.engine.scheduler import NextTokens, Token
from minigpt4_runtime.engine.sequence import Branch, Sequence
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import TokenLogprobs


class ReferenceSampler:
    """Chooses as `Sampler` must."""

    def __init__(self, *, bos_id: int, eos_id: int) -> None:
        self._bos_id = bos_id
        self._eos_id = eos_id

    @torch.inference_mode()
    def pick(
        self, logits: Tensor, sequences: Many[Sequence]
    ) -> dict[int, NextTokens | RequestError]:
        """Sequence id → its choice. Non-finite logits fail only the affected sequence."""
        best = logits.argmax(-1).tolist()
        # The sum of a row with NaN or inf is not finite, and sums of logits do not overflow.
        is_finite = torch.isfinite(logits.sum(-1)).tolist()
        choices: dict[int, NextTokens | RequestError] = {}
        first = 0
        for sequence in sequences:
            rows = slice(first, first + len(sequence.branches))
            if not all(is_finite[rows]):
                choices[sequence.id] = overflow_error()
            elif takes_the_best(sequence):
                choices[sequence.id] = Token(best[first])
            else:
                try:
                    choices[sequence.id] = self._choose(logits[rows], sequence)
                except RequestError as error:
                    choices[sequence.id] = error
            first = rows.stop
        return choices

    def _choose(self, logits: Tensor, sequence: Sequence) -> NextTokens:
        """All steps, for one sequence: (branches, V) → its choice."""
        scores = logits.detach().to("cpu", torch.float32, copy=True)
        if sequence.search is not None:
            return self._continue_beams(scores, sequence)
        params, (branch,) = sequence.request.sampling, sequence.branches
        logprobs = scores[0].log_softmax(-1) if params.logprobs is not None else None
        self._reshape(scores[0], branch, sequence)
        chosen = _draw(scores[0], sequence) if params.temperature > 0 else int(scores[0].argmax())
        return Token(chosen, _logprobs(logprobs, chosen, params.logprobs))

    def _continue_beams(self, scores: Tensor, sequence: Sequence) -> list[Continuation]:
        """The best 2·num_beams continuations of all branches. Upstream scores log-probabilities."""
        scores = scores.log_softmax(-1)
        for row, branch in zip(scores, sequence.branches, strict=True):
            self._reshape(row, branch, sequence)
        sums = scores + torch.tensor([[branch.score] for branch in sequence.branches])
        count = min(2 * sequence.request.sampling.num_beams, sums.numel())
        best = sums.flatten().topk(count)
        return [
            Continuation(score, *divmod(index, sums.shape[1]))
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if score > float("-inf")
        ]

    def _reshape(self, scores: Tensor, branch: Branch, sequence: Sequence) -> None:
        """All steps that can change which id is the likeliest, in place."""
        params = sequence.request.sampling
        if params.logit_bias:
            biases = dict(params.logit_bias)
            scores[list(biases)] += torch.tensor(list(biases.values()), dtype=scores.dtype)
        if params.repetition_penalty != 1.0:
            # After Keskar et al., 2019. The original generates from embeddings: only a leading BOS
            # counts as seen, no prompt.
            seen = torch.tensor(sorted({self._bos_id, *branch.answer}))
            values = scores[seen]
            penalty = params.repetition_penalty
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
        if params.presence_penalty or params.frequency_penalty:
            said = Counter(branch.answer)
            counts = torch.tensor(list(said.values()))
            scores[list(said)] -= params.presence_penalty + params.frequency_penalty * counts
        if branch.guide is not None:
            scores[~torch.from_numpy(branch.guide.allowed())] = float("-inf")
        if len(branch.answer) < params.min_new_tokens:
            end = float(scores[self._eos_id])
            scores[self._eos_id] = float("-inf")
            if scores.max() == float("-inf"):
                scores[self._eos_id] = end  # Its form is complete: no other id may follow.


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


def _draw(scores: Tensor, sequence: Sequence) -> int:
    params = sequence.request.sampling
    # From the largest down and in float64, no temperature is too low: nothing overflows.
    scores = (scores - scores.max()).double() / params.temperature
    if params.top_k:
        least = scores.topk(min(params.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if params.top_p < 1.0:
        ascending, order = scores.sort(stable=True)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1.0 - params.top_p
        unlikely[-1] = False
        scores[order[unlikely]] = float("-inf")
    if params.min_p:
        # The largest is 0 here: a score is the logarithm of a share of the likeliest one's.
        scores = scores.masked_fill(scores < math.log(params.min_p), float("-inf"))
    race = scores.softmax(-1) / torch.from_numpy(exponentials(lot_of(sequence), len(scores)))
    return int(race.argmax())


def exponentials(key: int, count: int) -> numpy.ndarray:
    """SplitMix64 from a key on, a step for each id, as exponentials."""
    bits = numpy.uint64(key % 2**64) + numpy.arange(
        1, count + 1, dtype=numpy.uint64
    ) * numpy.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    bits ^= bits >> numpy.uint64(31)
    return -numpy.log(((bits >> numpy.uint64(12)) + 0.5) / 2**52)


def _logprobs(logprobs: Tensor | None, chosen: int, count: int | None) -> TokenLogprobs | None:
    if logprobs is None or count is None:
        return None
    values, ids = likeliest(logprobs, count)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(chosen, float(logprobs[chosen]), top)
