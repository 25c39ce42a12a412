"""Causal attention through torch's scaled_dot_product_attention, on any device that torch has.

Owns   the reading of a sequence's keys from its blocks, and the division of a step between prompts
       and a kernel for many sequences of one row.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies many keys whose blocks lie in one run: they are read in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.kernels.contracts import KernelLimits, SequenceRows, StepBatch
from minigpt4_runtime.model.llama import Attend

# (B, H, D) queries, one of each sequence, and a layer's keys and values in blocks → (B, H, D).
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Singles:
    """The sequences of a step that have one row. `num_tokens` are their `lengths` on the host."""

    num_tokens: tuple[int, ...]
    lengths: Tensor  # (B,)
    table_rows: Tensor  # (B,)
    block_table: Tensor

    @property
    def longest(self) -> int:
        """How many tokens the longest of them has."""
        return max(self.num_tokens)


# Makes a Decode, once a step.
Decoding = Callable[[Singles], Decode]

# Up to this size, copying a layer's keys costs less than one call for each sequence.
_COPIED_BYTES = 2**21


class SdpaAttention:
    """See `AttentionKernel`. Sequences of one row attend together while they are short."""

    limits: ClassVar = KernelLimits()

    def __init__(self, cache: FloatCache) -> None:
        self._cache = cache
        self._token_bytes = cache.keys[0, 0, 0].nbytes

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        counts = [each.num_tokens for each in batch.sequences if each.num_rows == 1]
        is_small = (
            len(counts) > 1 and len(counts) * max(counts) * self._token_bytes <= _COPIED_BYTES
        )
        return attend_with(self._cache, batch, self._gathered if is_small else None)

    def _gathered(self, singles: Singles) -> Decode:
        """Copy the sequences' keys side by side, the shorter ones followed by their last key."""
        block_size, lengths = self._cache.shape.block_size, singles.lengths[:, None]
        places = torch.arange(singles.longest, device=lengths.device)
        is_past_end = places >= lengths
        # As a bias, which torch would otherwise make of a mask in every layer.
        bias = torch.zeros(is_past_end.shape, dtype=self._cache.dtype, device=lengths.device)
        bias = bias.masked_fill_(is_past_end, float("-inf"))[:, None, None]  # (B, 1, 1, S)
        places = places.minimum(lengths - 1)
        table = singles.block_table[:, : -(-singles.longest // block_size)]
        blocks = table.index_select(0, singles.table_rows).long().gather(1, places // block_size)
        slots = (blocks * block_size + places % block_size).flatten()
        shape = (len(lengths), -1, self._cache.shape.num_heads, self._cache.shape.head_dim)

        def decode(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            k, v = (
                side.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)
                for side in (keys, values)
            )
            queries = q.view(len(q), shape[2], -1, shape[3])
            out = _attention(queries, k, v, attn_mask=bias.to(q.dtype))
            return out.view_as(q)

        return decode


def attend_with(cache: FloatCache, batch: StepBatch, decoding: Decoding | None) -> Attend:
    """Prepare a step in which the sequences of one row attend together, as `decoding` has it."""
    num_rows = [each.num_rows for each in batch.sequences]
    singles = [i for i, count in enumerate(num_rows) if count == 1] if decoding else []
    if decoding and len(singles) == len(num_rows):
        return _attend_decoding(cache, batch, decoding)
    decode, rows = None, batch.slots[:0]
    if decoding and singles:
        decode = decoding(_choose(batch, singles))
        first_rows = [batch.sequences[i].first_row for i in singles]
        rows = torch.tensor(first_rows, device=cache.device)
    views = [
        None if decode and each.num_rows == 1 else _view(each, batch, cache)
        for each in batch.sequences
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, batch.slots, k, v)
        keys, values = cache.keys[layer], cache.values[layer]
        attended = torch.cat(
            [
                view.attend(part, keys, values) if view else part
                for part, view in zip(q.split_with_sizes(num_rows), views, strict=True)
            ]
        )
        if decode:
            attended[rows] = decode(q[rows], keys, values)
        return attended

    return attend


def _attend_decoding(cache: FloatCache, batch: StepBatch, decoding: Decoding) -> Attend:
    """Prepare a step in which every sequence has one row."""
    num_tokens = tuple(each.num_tokens for each in batch.sequences)
    decode = decoding(Singles(num_tokens, batch.lengths, batch.table_rows, batch.block_table))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, batch.slots, k, v)
        return decode(q, cache.keys[layer], cache.values[layer])

    return attend


def _choose(batch: StepBatch, numbers: list[int]) -> Singles:
    """The sequences of these numbers in the batch."""
    index = torch.tensor(numbers, device=batch.lengths.device)
    num_tokens = tuple(batch.sequences[i].num_tokens for i in numbers)
    return Singles(num_tokens, batch.lengths[index], batch.table_rows[index], batch.block_table)


def _attention(q: Tensor, k: Tensor, v: Tensor, **masks: Tensor | bool | None) -> Tensor:
    """Torch's attention in the dtype of the queries, whatever the cache has."""
    return functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), **masks)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _View:
    """One sequence's part of a layer. `blocks` None: they lie in one run, from slot `start` on.

    `mask` None: no key lies in the future, or all are new.
    """

    num_tokens: int
    start: int
    blocks: Tensor | None
    mask: Tensor | None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(R, H, D) queries at the sequence's end, and a layer's keys and values → (R, H, D)."""
        keys, values = self._read(keys), self._read(values)
        num_rows, num_heads, head_dim = q.shape
        shares = num_heads // keys.shape[1]
        if num_rows == 1:
            # One token sees all: the heads that share keys are so many queries of one head.
            queries = q.view(1, -1, shares, head_dim)
            return _attention(queries, keys, values).view_as(q)
        if shares > 1:
            keys, values = (side.repeat_interleave(shares, dim=1) for side in (keys, values))
        out = _attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=self.mask, is_causal=self.mask is None
        )
        return out[0].transpose(0, 1)

    def _read(self, side: Tensor) -> Tensor:
        """A layer's (num_blocks, block_size, Hkv, D) → the sequence's (1, Hkv, S, D)."""
        if self.blocks is not None:
            tokens = side.index_select(0, self.blocks).flatten(0, 1)[: self.num_tokens]
            return tokens.transpose(0, 1)[None]
        # In one operation: the work for each sequence and layer decides the speed.
        _, _, num_heads, head_dim = side.shape
        width = num_heads * head_dim
        return side.as_strided(
            (1, num_heads, self.num_tokens, head_dim),
            (width, head_dim, width, 1),
            side.storage_offset() + self.start * width,
        )


def _view(sequence: SequenceRows, batch: StepBatch, cache: FloatCache) -> _View:
    count, total, mask = sequence.num_rows, sequence.num_tokens, None
    if 1 < count < total:
        mask = torch.ones(count, total, dtype=torch.bool, device=cache.device)
        mask = mask.tril(total - count)
    block_size = cache.shape.block_size
    if sequence.run_start is not None:
        return _View(total, sequence.run_start * block_size, None, mask)
    return _View(total, 0, batch.blocks_of(sequence, block_size), mask)
