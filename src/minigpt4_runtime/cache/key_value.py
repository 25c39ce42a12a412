"""The keys and values of all layers, in blocks of tokens.

Owns   their layout in memory and their format: how a key is stored, written and read back.
Takes  slots, which count tokens through all blocks: block · block_size + place in the block.
Never  knows which block belongs to which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from minigpt4_runtime.config import DTYPE_BYTES, DTYPE_NAMES, DTypeName, LanguageConfig


@dataclass(frozen=True)
class CacheShape:
    """One rank's share of a token: `num_heads` keys and values of `head_dim` in each layer."""

    num_layers: int
    num_heads: int
    head_dim: int
    block_size: int


class KeyValueCache(Protocol):
    """A cache of one format. Attention kernels state which formats they read."""

    shape: CacheShape
    num_blocks: int
    dtype: torch.dtype  # What is stored.
    device: torch.device

    @classmethod
    def block_bytes(cls, shape: CacheShape, dtype: DTypeName) -> int:
        """The size of one block of all layers, keys and values."""

    @classmethod
    def create(
        cls, shape: CacheShape, num_blocks: int, *, dtype: DTypeName, device: torch.device
    ) -> Self:
        """A cache that is not written to: no memory is taken before a block is first used."""

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put (T, heads, dim) keys and values of a layer into (T,) slots."""

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) slots → the layer's keys and values there, each (S, heads, dim) floats."""

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks of all layers."""


class FloatCache:
    """Keys and values as floats, each (layers, num_blocks, block_size, heads, dim)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        num_layers, self.num_blocks, block_size, num_heads, head_dim = keys.shape
        self.shape = CacheShape(num_layers, num_heads, head_dim, block_size)
        self.dtype = keys.dtype
        self.device = keys.device

    @classmethod
    def block_bytes(cls, shape: CacheShape, dtype: DTypeName) -> int:
        """See `KeyValueCache`."""
        numbers = shape.num_layers * shape.block_size * shape.num_heads * shape.head_dim
        return 2 * numbers * DTYPE_BYTES[dtype]

    @classmethod
    def create(
        cls, shape: CacheShape, num_blocks: int, *, dtype: DTypeName, device: torch.device
    ) -> Self:
        """See `KeyValueCache`."""
        size = (shape.num_layers, num_blocks, shape.block_size, shape.num_heads, shape.head_dim)
        return cls(
            *(torch.empty(size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KeyValueCache`."""
        for side, new in ((self.keys, keys), (self.values, values)):
            side[layer].flatten(0, 1).index_copy_(0, slots, new.to(side.dtype))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache`."""
        keys, values = (
            side[layer].flatten(0, 1).index_select(0, slots) for side in (self.keys, self.values)
        )
        return keys, values

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KeyValueCache`."""
        for side in (self.keys, self.values):
            side[:, targets] = side[:, sources]


# A format for each EngineConfig.cache_dtype but "auto".
CACHE_FORMATS: dict[DTypeName, type[FloatCache]] = dict.fromkeys(DTYPE_NAMES, FloatCache)


def token_bytes(config: LanguageConfig, dtype: DTypeName) -> int:
    """The size of one token's keys and values in all layers, on all ranks together."""
    shape = CacheShape(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, block_size=1
    )
    return CACHE_FORMATS[dtype].block_bytes(shape, dtype)
