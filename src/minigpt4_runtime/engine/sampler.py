"""Logits → the next id, for one request.

Owns   the order of the steps, which is that of transformers 4.30 as the original calls it:
       repetition penalty, forbidden end, temperature, top-k, top-p.
Takes  (V,) float32 logits. Randomness comes from the request's own seed, drawn on the CPU, so the
       same seed gives the same answer on every device that gives the same logits.
"""

import torch
from torch import Tensor

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import RequestError


class Sampler:
    """Chooses the ids of one answer, and remembers which it has chosen."""

    def __init__(self, params: SamplingParams, *, bos_id: int, eos_id: int) -> None:
        self._params = params
        self._eos_id = eos_id
        # The original generates from embeddings, so only a leading BOS counts as seen, no prompt.
        self._seen = [bos_id]
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def num_chosen(self) -> int:
        """How many ids have been chosen so far."""
        return len(self._seen) - 1

    def pick(self, logits: Tensor) -> int:
        """Choose the next id from (V,) logits.

        Raises:
            RequestError: the logits are no numbers, as happens when float16 overflows.
        """
        scores = logits.detach().to("cpu", torch.float32, copy=True)
        if not bool(torch.isfinite(scores).all()):
            raise RequestError(
                "The model's numbers overflowed for this input. Load it with dtype bfloat16 or "
                "float32 instead."
            )
        self._penalise_repetition(scores)
        if self.num_chosen < self._params.min_new_tokens:
            scores[self._eos_id] = float("-inf")
        chosen = self._draw(scores) if self._params.temperature > 0 else int(scores.argmax())
        self._seen.append(chosen)
        return chosen

    def _penalise_repetition(self, scores: Tensor) -> None:
        """Keskar et al., 2019: divide what was seen, or multiply where it is negative."""
        penalty = self._params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(self._seen)))
            values = scores[seen]
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)

    def _draw(self, scores: Tensor) -> int:
        # From the largest down and in float64, no temperature is too low: nothing overflows.
        scores = (scores - scores.max()).double() / self._params.temperature
        if self._params.top_k:
            least = scores.topk(min(self._params.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self._params.top_p < 1.0:
            ascending, order = scores.sort()
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1.0 - self._params.top_p
            unlikely[-1] = False
            scores[order[unlikely]] = float("-inf")
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
