"""What an attention kernel must offer, and the step that it is given.

Owns   the protocol, and which rows of a step belong to which sequence.
Takes  nothing: there is no code here that computes.
"""

from dataclasses import dataclass
from typing import Protocol

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.model.llama import Attend


@dataclass(frozen=True)
class SequenceSlice:
    """Which rows of a step belong to one sequence, and where that sequence is cached.

    `num_tokens` counts its tokens up to the last of this step, which are the last `num_rows` of
    them; token i lies in `blocks[i // block_size]`.
    """

    first_row: int
    num_rows: int
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class BatchLayout:
    """The sequences of one step, whose tokens are packed into T rows, one after the other."""

    sequences: tuple[SequenceSlice, ...]

    def positions(self) -> list[int]:
        """At which position of its sequence each row stands: T numbers."""
        return [
            position
            for each in self.sequences
            for position in range(each.num_tokens - each.num_rows, each.num_tokens)
        ]

    def slots(self, block_size: int) -> list[int]:
        """Where each row's key and value go, counted in tokens through all blocks: T numbers."""
        return [
            each.blocks[position // block_size] * block_size + position % block_size
            for each in self.sequences
            for position in range(each.num_tokens - each.num_rows, each.num_tokens)
        ]


class AttentionKernel(Protocol):
    """Causal attention over a cache in blocks, for packed sequences of any lengths."""

    def __call__(self, cache: KeyValueCache, batch: BatchLayout) -> Attend:
        """Prepare a step. What is worked out here serves every layer.

        The result writes a layer's k and v into the cache and attends.
        """
        ...
