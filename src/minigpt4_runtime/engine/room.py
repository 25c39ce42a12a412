"""What fits: the requests that an engine can serve at all, before any of their images is opened.

Owns   the limits of the context, the cache and `max_running`, and the sentences about them.
Takes  lengths and sampling settings; raises, or gives how much of a request is computed at most.
Never  knows what runs now.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.errors import PromptTooLongError, RequestError

# The share of `max_running` that one request's candidates take, which leaves room for others.
CANDIDATES_SHARE = 4


@dataclass(frozen=True)
class Room:
    """The room of an engine with so many blocks, for sequences of up to `max_context` tokens."""

    config: EngineConfig
    num_blocks: int
    max_context: int

    @property
    def num_tokens(self) -> int:
        """How many tokens a request can have at once, as the context and the cache allow."""
        return min(self.max_context, self.num_blocks * self.config.block_size)

    def check(
        self,
        num_prompt: int,
        sampling: SamplingParams,
        limit: int | None = None,
        *,
        beside: Collection[int] = (),
    ) -> None:
        """Refuse a request that can never be served.

        With a window, `limit` is its limit, and the prompt fits into it. `beside` are the lengths
        of the other prompts.

        Raises:
            PromptTooLongError: a prompt leaves no room for an answer.
            RequestError: the beams or the branches need more room than there is.
        """
        longest = max(num_prompt, *beside, 0)
        if limit is None and longest >= self.max_context:
            raise PromptTooLongError(longest, self.max_context)
        if limit is None and longest >= self.num_tokens:
            raise PromptTooLongError(longest, self.num_tokens, holder="the engine's cache")
        beams, most = sampling.num_beams, self.config.max_running
        if beams > most:
            raise RequestError(
                f"num_beams is {beams}, but only {most} answers run at once, which is max_running. "
                "Lower it."
            )
        max_new_tokens = self._max_new_tokens(longest, sampling, limit)
        needed = self.blocks_needed(num_prompt, beams, max_new_tokens, limit)
        if beside:
            self._check_beside(beside, beams, max_new_tokens, needed)
        if needed > self.num_blocks:
            raise RequestError(
                f"A search with {beams} beams on a prompt of {num_prompt} tokens takes {needed} "
                f"blocks of the cache, which has {self.num_blocks} (num_blocks). Lower num_beams "
                "or max_new_tokens."
            )

    def _check_beside(
        self, beside: Collection[int], beams: int, max_new_tokens: int, needed: int
    ) -> None:
        """`needed` are the blocks of the request's own prompt and answer."""
        count, most = len(beside), self.config.max_running
        if beams > 1:
            raise RequestError(
                f"num_beams is {beams} and there are branches, which go along with one answer. "
                "Leave out one of them."
            )
        if 1 + count > most:
            raise RequestError(
                f"The prompt and its branches are {1 + count}, but only {most} run at once, which "
                "is max_running. Raise it, or give fewer branches."
            )
        for each in beside:
            needed += self.blocks_needed(each, 1, max_new_tokens)
        if needed > self.num_blocks:
            raise RequestError(
                f"The prompt and its branches take {needed} blocks of the cache, which has "
                f"{self.num_blocks} (num_blocks). Lower max_new_tokens, or give fewer branches."
            )

    def check_candidates(self, num_prompt: int, longest: int) -> None:
        """Refuse candidates of up to `longest` ids that can never be scored.

        Raises:
            RequestError: prompt and candidate do not fit.
        """
        if num_prompt + longest - 1 > self.num_tokens:
            raise RequestError(
                f"A prompt of {num_prompt} tokens and a candidate of {longest} do not fit: the "
                f"model's context and the engine's cache hold {self.num_tokens}. Shorten one of "
                "them."
            )

    def most_new_tokens(self, request: Request) -> int:
        """How many ids a request can add to its prompts, after checking it.

        Raises:
            RequestError: it can never be served.
        """
        num_prompt, beside = (
            len(request.token_ids),
            [len(each.token_ids) for each in request.beside],
        )
        if request.candidates:
            longest = max(map(len, request.candidates))
            self.check_candidates(num_prompt, longest)
            return longest
        assert not (beside and request.window), "what is beside a prompt has no window"
        limit = request.window.limit if request.window else None
        self.check(num_prompt, request.sampling, limit, beside=beside)
        return self._max_new_tokens(max(num_prompt, *beside, 0), request.sampling, limit)

    def _max_new_tokens(self, num_prompt: int, sampling: SamplingParams, limit: int | None) -> int:
        if limit is not None:
            return sampling.max_new_tokens
        return min(sampling.max_new_tokens, self.num_tokens - num_prompt)

    def candidates_at_once(self, num_prompt: int, longest: int) -> int:
        """How many candidates of up to `longest` ids are computed side by side."""
        shared, rest = divmod(num_prompt - 1, self.config.block_size)
        fitting = (self.num_blocks - shared) // self._num_blocks(rest + longest)
        return max(1, min(self.config.max_running // CANDIDATES_SHARE, fitting))

    def blocks_needed(
        self, num_prompt: int, num_branches: int, max_new_tokens: int, limit: int | None = None
    ) -> int:
        """How many blocks a request takes at the most, once it runs alone.

        `limit` is that of its window.
        """
        if limit is not None and num_prompt + max_new_tokens - 1 > limit:
            return num_branches * self._num_blocks(limit)
        # The last token's key is never needed, and branches share the prompt's full blocks.
        shared, rest = divmod(num_prompt, self.config.block_size)
        return shared + num_branches * self._num_blocks(rest + max_new_tokens - 1)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)
