"""Causal attention through torch's scaled_dot_product_attention, on any device that torch has.

Owns   how a sequence's keys are read from its blocks, and how a step is shared with a kernel that
       serves many sequences of one row at once.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies many keys whose blocks lie in one run: they are read where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.kernels.contracts import BatchLayout, SequenceSlice
from minigpt4_runtime.model.llama import Attend

# (B, H, D) queries, one of each sequence, and a layer's keys and values in blocks → (B, H, D).
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
# What makes it, once a step, for these sequences.
Decoding = Callable[[KeyValueCache, Sequence[SequenceSlice]], Decode]

# So much of a layer's keys is copied to attend together: it costs less than a call a sequence.
_COPIED_BYTES = 2**21


def prepare(cache: KeyValueCache, batch: BatchLayout) -> Attend:
    """See `AttentionKernel`. Sequences of one row attend together while they are short."""
    singles = [each for each in batch.sequences if each.num_rows == 1]
    longest = max((each.num_tokens for each in singles), default=0)
    token_bytes = cache.keys[0, 0, 0].nbytes
    is_small = 1 < len(singles) <= _COPIED_BYTES / (longest * token_bytes or 1)
    return prepare_with(cache, batch, _gathered if is_small else None)


def _gathered(cache: KeyValueCache, singles: Sequence[SequenceSlice]) -> Decode:
    """Copy the sequences' keys side by side, the shorter ones followed by their last key."""
    device, (num_kv_heads, head_dim) = cache.keys.device, cache.keys.shape[3:]
    lengths = torch.tensor([[each.num_tokens] for each in singles], device=device)
    places = torch.arange(int(lengths.max()), device=device)
    is_past_end = places >= lengths
    # What torch would else make of a mask in every layer.
    bias = torch.zeros(is_past_end.shape, dtype=cache.keys.dtype, device=device)
    bias = bias.masked_fill_(is_past_end, float("-inf"))[:, None, None]  # (B, 1, 1, S)
    places = places.minimum(lengths - 1)
    blocks = block_table(singles, device).long().gather(1, places // cache.block_size)
    slots = (blocks * cache.block_size + places % cache.block_size).flatten()
    shape = (len(singles), -1, num_kv_heads, head_dim)

    def decode(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = (
            side.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)
            for side in (keys, values)
        )
        queries = q.view(len(q), num_kv_heads, -1, head_dim)
        out = functional.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
        return out.view_as(q)

    return decode


def prepare_with(cache: KeyValueCache, batch: BatchLayout, decoding: Decoding | None) -> Attend:
    """Prepare a step in which the sequences of one row attend together, as `decoding` has it."""
    device, num_rows = cache.keys.device, [each.num_rows for each in batch.sequences]
    slots = torch.tensor(batch.slots(cache.block_size), device=device)
    singles = [each for each in batch.sequences if decoding and each.num_rows == 1]
    rows = torch.tensor([each.first_row for each in singles], device=device)
    decode = decoding(cache, singles) if decoding and singles else None
    views = [
        None if decoding and each.num_rows == 1 else _view(each, cache) for each in batch.sequences
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = _write(cache, layer, slots, k, v)
        if decode and len(singles) == len(views):
            return decode(q, keys, values)
        attended = torch.cat(
            [
                view.attend(part, layer) if view else part
                for part, view in zip(q.split_with_sizes(num_rows), views, strict=True)
            ]
        )
        if decode:
            attended[rows] = decode(q[rows], keys, values)
        return attended

    return attend


def block_table(sequences: Sequence[SequenceSlice], device: torch.device) -> Tensor:
    """(B, most blocks of a sequence) int32: a sequence's blocks, then zeros."""
    width = max(len(each.blocks) for each in sequences)
    rows = [each.blocks + (0,) * (width - len(each.blocks)) for each in sequences]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _write(
    cache: KeyValueCache, layer: int, slots: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Put k and v into a layer's slots → its keys and values, each (num_blocks, block_size, …)."""
    keys, values = cache.keys[layer], cache.values[layer]
    keys.flatten(0, 1).index_copy_(0, slots, k)
    values.flatten(0, 1).index_copy_(0, slots, v)
    return keys, values


@dataclass(frozen=True)
class _View:
    """One sequence's keys and values. `mask` None: no key lies in the future, or all are new."""

    keys: Callable[[int], Tensor]  # Layer → (1, Hkv, S, D).
    values: Callable[[int], Tensor]
    mask: Tensor | None

    def attend(self, q: Tensor, layer: int) -> Tensor:
        """(R, H, D) queries at the end of the sequence → (R, H, D)."""
        keys, values = self.keys(layer), self.values(layer)
        num_rows, num_heads, head_dim = q.shape
        shares = num_heads // keys.shape[1]
        if num_rows == 1:
            # One token sees all: the heads that share keys are so many queries of one head.
            queries = q.view(1, -1, shares, head_dim)
            return functional.scaled_dot_product_attention(queries, keys, values).view_as(q)
        if shares > 1:
            keys, values = (side.repeat_interleave(shares, dim=1) for side in (keys, values))
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=self.mask, is_causal=self.mask is None
        )
        return out[0].transpose(0, 1)


def _view(sequence: SequenceSlice, cache: KeyValueCache) -> _View:
    count, total, mask = sequence.num_rows, sequence.num_tokens, None
    if 1 < count < total:
        mask = torch.ones(count, total, dtype=torch.bool, device=cache.keys.device)
        mask = mask.tril(total - count)
    return _View(_reader(sequence, cache.keys), _reader(sequence, cache.values), mask)


def _reader(sequence: SequenceSlice, side: Tensor) -> Callable[[int], Tensor]:
    """Layer → the sequence's part of one side of the cache, (1, Hkv, S, D)."""
    first, total = sequence.blocks[0], sequence.num_tokens
    if sequence.blocks == tuple(range(first, first + len(sequence.blocks))):
        # One cut for all layers: what is done for each sequence and layer decides the speed.
        start = first * side.shape[2]
        run = side.flatten(1, 2)[:, None, start : start + total]
        return run.transpose(2, 3).unbind().__getitem__
    blocks = torch.tensor(sequence.blocks, device=side.device)

    def gather(layer: int) -> Tensor:
        tokens = side[layer].index_select(0, blocks).flatten(0, 1)[:total]
        return tokens.transpose(0, 1)[None]

    return gather
