"""The contracts of attention kernels and of the choice of ids, and what both are given.

Owns   the protocols, the assignment of a step's rows to sequences and slots, and the lots.
Takes  nothing: there is no code here that attends or chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import FloatCache, KeyValueCache
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.model.llama import Attend


class SequenceRows(NamedTuple):
    """Which rows of a step belong to one sequence, and where that sequence is cached.

    `num_tokens` counts its tokens up to the last of this step, which are the last `num_rows` of
    them. Its blocks stand in row `table_row` of the block table; `run_start` is the first of them
    where each lies behind the one before, else None.
    """

    first_row: int
    num_rows: int
    num_tokens: int
    table_row: int
    run_start: int | None


@dataclass(frozen=True)
class StepBatch:
    """The sequences of one step, whose tokens are packed into T rows, one after the other.

    All tensors are int64 on the device, but for the block table, which is int32. Token i of a
    sequence lies in block `block_table[table_row, i // block_size]`.
    """

    sequences: tuple[SequenceRows, ...]
    slots: Tensor  # (T,): where each row's key and value go, counted in tokens through all blocks.
    lengths: Tensor  # (B,): each sequence's num_tokens.
    table_rows: Tensor  # (B,): each sequence's table_row.
    block_table: Tensor  # (rows, most blocks of a sequence); the rest of a row is undefined.

    def blocks_of(self, sequence: SequenceRows, block_size: int) -> Tensor:
        """The blocks that hold a sequence, in order."""
        return self.block_table[sequence.table_row, : -(-sequence.num_tokens // block_size)]

    def slots_of(self, sequence: SequenceRows, block_size: int) -> Tensor:
        """Where a sequence's tokens lie, in order."""
        blocks = self.blocks_of(sequence, block_size).long()
        places = torch.arange(block_size, device=blocks.device)
        return (blocks[:, None] * block_size + places).flatten()[: sequence.num_tokens]


@dataclass(frozen=True)
class KernelLimits:
    """Which caches a kernel takes: formats, the dtypes of floats, and sizes that are multiples."""

    formats: tuple[type, ...] = (FloatCache,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    block_size_step: int = 1
    head_dim_step: int = 1

    def takes(self, cache: KeyValueCache) -> bool:
        """Whether a cache is within these limits."""
        shape = cache.shape
        return (
            isinstance(cache, self.formats)
            and (not isinstance(cache, FloatCache) or cache.dtype in self.dtypes)
            and shape.block_size % self.block_size_step == 0
            and shape.head_dim % self.head_dim_step == 0
        )


class AttentionKernel(Protocol):
    """Causal attention over a cache in blocks, for packed sequences of any lengths.

    It is made once for a cache, and called once for each step.
    """

    limits: ClassVar[KernelLimits]
    # Whether a step in which each sequence has one row may be captured as a graph, and replayed
    # with other numbers at the same addresses.
    is_capturable: ClassVar[bool]

    def __init__(self, cache: KeyValueCache) -> None:
        """Bind to a cache within the limits."""

    def __call__(self, batch: StepBatch) -> Attend:
        """Prepare a step, once for all layers.

        The result writes a layer's k and v into the cache and attends. It may be a `TurningAttend`.
        """


@dataclass(frozen=True)
class Lots:
    """How d rows are drawn: the settings of each, and the key of its random numbers, an int64."""

    settings: tuple[SamplingParams, ...]
    keys: tuple[int, ...]


class RowChoice(Protocol):
    """The choice of an id from each row of scores, on their device, without waiting for it."""

    def best(self, logits: Tensor) -> Tensor:
        """(R, V) float32 → (2, R) int64: the id of each row's largest, of equals the first.

        And 1 if all of the row is finite, else 0, where the id means nothing.
        """

    def draw(self, scores: Tensor, lots: Lots) -> Tensor:
        """(d, V) float32 scores → (d,) int64 ids, drawn by temperature, top-k, top-p and min-p.

        A row of the lots' settings has a temperature above 0.
        """
