"""Causal attention through torch's scaled_dot_product_attention, on any device that torch has.

Owns   the reading of a sequence's keys from its blocks, and the division of a step between prompts
       and a kernel for many sequences of one row.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies many floats whose blocks lie in one run: they are read in place. Of quantised keys and
       values it widens one sequence's, of a few heads at a time. On a CPU it makes no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.cache.key_value import FloatCache, QuantisedCache
from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.kernels.contracts import KernelLimits, SequenceRows, StepBatch
from minigpt4_runtime.model.llama import Attend

# A layer's number and (B, H, D) queries, one of each sequence → (B, H, D).
Decode = Callable[[int, Tensor], Tensor]
TorchCache = FloatCache | QuantisedCache


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
# `KeyValueCache.write`, or another way to the same.
Write = Callable[[int, Tensor, Tensor, Tensor], None]

# Up to this size, copying a layer's keys costs less than one call for each sequence.
_COPIED_BYTES = 2**21
# What a sequence's keys and values may take as float32, if one head of them does not take more.
_WIDENED_BYTES = 2**25


class SdpaAttention:
    """See `AttentionKernel`. Sequences of one row attend together while they are short."""

    limits: ClassVar = KernelLimits(formats=(FloatCache, QuantisedCache))
    is_capturable: ClassVar = False

    def __init__(self, cache: TorchCache) -> None:
        self._cache = cache
        self._copied_as = cache.dtype if isinstance(cache, FloatCache) else torch.float32
        numbers = cache.shape.num_heads * cache.shape.head_dim
        self._token_bytes = numbers * self._copied_as.itemsize

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
        bias = torch.zeros(is_past_end.shape, dtype=self._copied_as, device=lengths.device)
        bias = bias.masked_fill_(is_past_end, float("-inf"))[:, None, None]  # (B, 1, 1, S)
        places = places.minimum(lengths - 1)
        table = singles.block_table[:, : -(-singles.longest // block_size)]
        blocks = table.index_select(0, singles.table_rows).long().gather(1, places // block_size)
        slots = (blocks * block_size + places % block_size).flatten()
        shape = (len(lengths), -1, self._cache.shape.num_heads, self._cache.shape.head_dim)

        def decode(layer: int, q: Tensor) -> Tensor:
            sides = self._cache.read(layer, slots)
            k, v = (side.view(shape).transpose(1, 2) for side in sides)
            queries = q.view(len(q), shape[2], -1, shape[3])
            out = _attention(queries, k, v, attn_mask=bias.to(q.dtype))
            return out.view_as(q)

        return decode


def attend_with(
    cache: TorchCache, batch: StepBatch, decoding: Decoding | None, write: Write | None = None
) -> Attend:
    """Prepare a step in which the sequences of one row attend together, as `decoding` has it.

    `write` takes the place of the cache's own.
    """
    write = write or cache.write
    num_rows = [each.num_rows for each in batch.sequences]
    singles = [i for i, count in enumerate(num_rows) if count == 1] if decoding else []
    if decoding and len(singles) == len(num_rows):
        return _attend_decoding(batch, decoding, write)
    decode, rows = None, batch.slots[:0]
    if decoding and singles:
        first_rows = [batch.sequences[i].first_row for i in singles]
        numbers, rows = send(torch.tensor((singles, first_rows)), cache.device)
        num_tokens = tuple(batch.sequences[i].num_tokens for i in singles)
        decode = decoding(
            Singles(
                num_tokens, batch.lengths[numbers], batch.table_rows[numbers], batch.block_table
            )
        )
    views = [
        None if decode and each.num_rows == 1 else _view(each, batch, cache)
        for each in batch.sequences
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write(layer, batch.slots, k, v)
        attended = torch.cat(
            [
                view.attend(layer, part) if view else part
                for part, view in zip(q.split_with_sizes(num_rows), views, strict=True)
            ]
        )
        if decode:
            attended[rows] = decode(layer, q[rows])
        return attended

    return attend


def _attend_decoding(batch: StepBatch, decoding: Decoding, write: Write) -> Attend:
    """Prepare a step in which every sequence has one row."""
    num_tokens = tuple(each.num_tokens for each in batch.sequences)
    decode = decoding(Singles(num_tokens, batch.lengths, batch.table_rows, batch.block_table))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write(layer, batch.slots, k, v)
        return decode(layer, q)

    return attend


def _attention(q: Tensor, k: Tensor, v: Tensor, **masks: Tensor | bool | None) -> Tensor:
    """Torch's attention in the dtype of the queries, whatever the cache has."""
    return functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), **masks)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _FloatView:
    """One sequence's part of a cache of floats.

    `blocks` None: they lie in one run, from slot `start` on.
    """

    cache: FloatCache
    num_tokens: int
    start: int
    blocks: Tensor | None
    mask: Tensor | None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """A layer's number, and (R, H, D) queries at the sequence's end → (R, H, D)."""
        keys, values = (self._read(side[layer]) for side in (self.cache.keys, self.cache.values))
        return _attend_one(q, keys, values, self.mask)

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


@dataclass(frozen=True)
class _WidenedView:
    """One sequence's part of a quantised cache, read a few heads at a time."""

    cache: QuantisedCache
    slots: Tensor
    mask: Tensor | None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See `_FloatView`."""
        shape = self.cache.shape
        shares = q.shape[1] // shape.num_heads
        head_bytes = 2 * len(self.slots) * shape.head_dim * torch.float32.itemsize
        at_once = max(1, _WIDENED_BYTES // head_bytes)
        attended = []
        for first in range(0, shape.num_heads, at_once):
            heads = slice(first, min(first + at_once, shape.num_heads))
            sides = self.cache.read(layer, self.slots, heads)
            keys, values = (side.to(q.dtype).transpose(0, 1)[None] for side in sides)
            queries = q[:, heads.start * shares : heads.stop * shares]
            attended.append(_attend_one(queries, keys, values, self.mask))
        return torch.cat(attended, dim=1)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """(R, H, D) queries at the end of a sequence's (1, Hkv, S, D) keys and values → (R, H, D).

    `mask` None: no key lies in the future, or all are new, or a CPU needs none.
    """
    num_rows, num_heads, head_dim = q.shape
    shares = num_heads // keys.shape[1]
    if num_rows == 1:
        # One token sees all: the heads that share keys are so many queries of one head.
        queries = q.reshape(1, -1, shares, head_dim)
        return _attention(queries, keys, values).reshape(q.shape)
    if mask is None and num_rows < keys.shape[2]:
        return _attend_in_two(q, keys.to(q.dtype), values.to(q.dtype))
    if shares > 1:
        keys, values = (side.repeat_interleave(shares, dim=1) for side in (keys, values))
    out = _attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None)
    return out[0].transpose(0, 1)


def _attend_in_two(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same on a CPU, whose kernel says what its result weighs: no mask is made of the past.

    All rows see all old keys: the heads that share one are so many queries of it. Keys of the new
    rows alone are repeated for such heads.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_past = keys.shape[1], keys.shape[2] - num_rows
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001
    queries = q.transpose(0, 1)[None]
    grouped = queries.reshape(1, num_kv_heads, -1, head_dim)
    past, past_log = attend(grouped, keys[:, :, :num_past], values[:, :, :num_past])
    newest = (side[:, :, num_past:] for side in (keys, values))
    if num_heads > num_kv_heads:
        newest = (side.repeat_interleave(num_heads // num_kv_heads, dim=1) for side in newest)
    new, new_log = attend(queries, *newest, is_causal=True)
    weight = torch.sigmoid(past_log.reshape(new_log.shape) - new_log)[..., None].to(q.dtype)
    return torch.lerp(new, past.reshape(new.shape), weight)[0].transpose(0, 1)


def _view(sequence: SequenceRows, batch: StepBatch, cache: TorchCache) -> _FloatView | _WidenedView:
    count, total, mask = sequence.num_rows, sequence.num_tokens, None
    if 1 < count < total and cache.device.type != "cpu":
        mask = torch.ones(count, total, dtype=torch.bool, device=cache.device)
        mask = mask.tril(total - count)
    if isinstance(cache, QuantisedCache):
        return _WidenedView(cache, batch.slots_of(sequence, cache.shape.block_size), mask)
    block_size = cache.shape.block_size
    if sequence.run_start is not None:
        return _FloatView(cache, total, sequence.run_start * block_size, None, mask)
    return _FloatView(cache, total, 0, batch.blocks_of(sequence, block_size), mask)
