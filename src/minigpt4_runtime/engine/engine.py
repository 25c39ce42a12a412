"""Answers requests, one at a time.

Owns   the loop from a prompt to its last token, and when it ends.
Takes  a Request; gives its TokenEvents as they come. Closing the iterator ends the work.
Never  knows text: stop strings are watched by the caller, who then stops asking.
"""

from collections.abc import Iterator

import torch

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.engine.request import Request, TokenEvent
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.engine.sampler import Sampler
from minigpt4_runtime.errors import ConfigError, PromptTooLongError, RequestError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory; on a CPU it says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Engine:
    """Serves requests independently of each other: each has a cache of its own."""

    def __init__(self, runner: Runner, *, bos_id: int, eos_id: int) -> None:
        self._runner = runner
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._limit = runner.config.language.max_position_embeddings

    def check(self, token_ids: tuple[int, ...], sampling: SamplingParams) -> None:
        """Refuse what cannot be served, before any picture is opened.

        Raises:
            PromptTooLongError: the prompt leaves no room for an answer.
            ConfigError: beam search is asked for.
        """
        if len(token_ids) >= self._limit:
            raise PromptTooLongError(len(token_ids), self._limit)
        if sampling.num_beams > 1:
            raise ConfigError(
                f"num_beams is {sampling.num_beams}, but this version has no beam search. "
                "Set num_beams to 1."
            )

    def generate(self, request: Request) -> Iterator[TokenEvent]:
        """Yield the answer's tokens. Refuses at once what `check` refuses.

        Raises:
            RequestError: while it runs, when the device has too little memory for it.
        """
        self.check(request.token_ids, request.sampling)
        room = self._limit - len(request.token_ids)
        return self._guarded(request, max_new_tokens=min(room, request.sampling.max_new_tokens))

    def _guarded(self, request: Request, *, max_new_tokens: int) -> Iterator[TokenEvent]:
        try:
            yield from self._run(request, max_new_tokens=max_new_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RequestError(
                f"The device ran out of memory on a prompt of {len(request.token_ids)} tokens. "
                "Shorten the prompt, lower max_new_tokens, or load the model in a smaller dtype."
            ) from None

    def _run(self, request: Request, *, max_new_tokens: int) -> Iterator[TokenEvent]:
        sampler = Sampler(request.sampling, bos_id=self._bos_id, eos_id=self._eos_id)
        cache = self._runner.new_cache(len(request.token_ids) + max_new_tokens)
        logits = self._runner.forward(self._runner.embed(request), cache)
        while True:
            token_id = sampler.pick(logits)
            if self._ends(token_id, request.sampling):
                yield TokenEvent(token_id, "stop")
                return
            if sampler.num_chosen == max_new_tokens:
                yield TokenEvent(token_id, "length")
                return
            yield TokenEvent(token_id, None)
            logits = self._runner.forward(self._runner.embed_token(token_id), cache)

    def _ends(self, token_id: int, sampling: SamplingParams) -> bool:
        return token_id == self._eos_id and not sampling.ignore_eos
