"""Causal attention for CUDA: prompts and rows that decode in one Triton kernel.

Owns   the kernels, the division of a step's rows into tiles, and of long contexts into shares.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies or widens keys, nor waits for the GPU. What it launches for rows that decode depends
       on no length, so that a graph can hold it.

A tile is some rows of one sequence with all query heads of one key/value head. A step in which
each sequence has one row takes tiles of one row. In any other step such rows take the wide tiles of
prompts too: one launch serves all, at the cost of some products by zero.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache as once
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import (
    CacheShape,
    FloatCache,
    Fp8Cache,
    Int4Cache,
    Int8Cache,
)
from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.kernels.cache_write_triton import (
    TritonCache,
    format_of,
    sides_of,
    turn_and_write,
)
from minigpt4_runtime.kernels.contracts import KernelLimits, SequenceRows, StepBatch
from minigpt4_runtime.kernels.launching import on_device_of, overlapping, wait_for_last
from minigpt4_runtime.model.llama import Attend, TurningAttend
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

# The smallest side of a matrix that tensor cores multiply, and the side of a prompt's tiles:
# query rows times the heads that share a key/value head.
_MIN_SIDE = 16
_WIDE_SIDE = 64
_SHARES_AT_ONCE = 16
# A context is cut so that about so many programs run, but into no smaller shares than this.
_WANTED_PROGRAMS = 256
_MIN_SHARE = 128


class TritonAttention:
    """See `AttentionKernel`."""

    limits: ClassVar = KernelLimits(formats=(FloatCache, Int8Cache, Int4Cache, Fp8Cache))
    is_capturable: ClassVar = True

    def __init__(self, cache: TritonCache) -> None:
        self._cache = cache

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`. For rows that decode, the GPU alone reads how long they are."""
        cache, shape, sequences = self._cache, self._cache.shape, batch.sequences
        is_decode = all(each.num_rows == 1 for each in sequences)
        table_width = batch.block_table.shape[1]
        most_tokens = table_width * shape.block_size
        if not is_decode:
            most_tokens = max(each.num_tokens for each in sequences)

        @once  # For a step: the number of query heads is first seen here.
        def tiles_of(group: int) -> Tensor:
            if is_decode:
                return batch.lengths
            tiles = _cut_into_tiles(sequences, max(1, _WIDE_SIDE // group))
            return send(torch.tensor(tiles, dtype=torch.int32), cache.device)

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None
        ) -> Tensor:
            q = turn_and_write(cache, layer, batch.slots, q, k, v, rotation)
            group = q.shape[1] // shape.num_heads
            tiles = tiles_of(group)
            grid = (len(tiles), shape.num_heads, _num_shares(len(tiles), most_tokens, shape))
            num_shares = grid[2]
            attended = torch.empty_like(q)
            mixed, log_totals = attended, attended
            if num_shares > 1:
                mixed = q.new_empty(len(q), num_shares, *q.shape[1:], dtype=torch.float32)
                log_totals = q.new_empty(mixed.shape[:3], dtype=torch.float32)
            with on_device_of(q):
                # Three stages: the table is read ahead of the keys that it leads to.
                _attend_tile[grid](
                    q, *sides_of(cache, layer), tiles, batch.table_rows, batch.block_table, mixed,
                    log_totals, table_width, q.shape[2] ** -0.5 * math.log2(math.e),
                    **_sizes(shape, group, q.dtype, is_decode=is_decode),
                    **format_of(cache), IS_SHARED=num_shares > 1,
                    num_warps=4 if is_decode else 8, num_stages=3, **overlapping(q.device),
                )  # fmt: skip
                if num_shares > 1:
                    _join_shares[q.shape[:2]](
                        mixed, log_totals, attended, num_shares, shape.head_dim,
                        DIMS=triton.next_power_of_2(shape.head_dim), SHARES=_SHARES_AT_ONCE,
                        **overlapping(q.device),
                    )  # fmt: skip
            return attended

        return TurningAttend(attend)


def _cut_into_tiles(
    sequences: Sequence[SequenceRows], rows_at_once: int
) -> list[tuple[int, int, int, int]]:
    """The first row of each tile, how many it has, the tokens up to its last row, its table row.

    Those with the most tokens come first, because the last programs to start should be short.
    """
    tiles = [
        (
            each.first_row + first,
            (count := min(rows_at_once, each.num_rows - first)),
            each.num_tokens - each.num_rows + first + count,
            each.table_row,
        )
        for each in sequences
        for first in range(0, each.num_rows, rows_at_once)
    ]
    return sorted(tiles, key=lambda tile: -tile[2])


def _num_shares(num_tiles: int, most_tokens: int, shape: CacheShape) -> int:
    """Into how many shares a context is cut: more for fewer tiles."""
    wanted = -(-_WANTED_PROGRAMS // (num_tiles * shape.num_heads))
    return min(wanted, -(-most_tokens // _MIN_SHARE))


def _sizes(shape: CacheShape, group: int, dtype: torch.dtype, *, is_decode: bool) -> dict[str, int]:
    """The sizes that the kernel is compiled for. By ptxas, halves of 128 fit into registers."""
    least = _MIN_SIDE if is_decode else _WIDE_SIDE
    return {
        "BLOCK_SIZE": shape.block_size,
        "GROUP": group,
        "SIDE": max(least, triton.next_power_of_2(group)),
        "HEAD_DIM": shape.head_dim,
        "DIMS": max(_MIN_SIDE, triton.next_power_of_2(shape.head_dim)),
        "KEYS": 32 if is_decode or dtype == torch.float32 else 64,
        "MIN_SHARE": _MIN_SHARE,
        "IS_DECODE": is_decode,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _load_cached(  # noqa: PLR0913, PLR0917
    numbers: tl.tensor,
    scales: tl.tensor,
    heads: tl.tensor,  # (KEYS,): counted through all tokens.
    dims: tl.tensor,  # (DIMS,)
    is_token: tl.tensor,  # (KEYS,): what is to be read.
    is_dim: tl.tensor,  # (DIMS,)
    HEAD_DIM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INT4_GROUP: tl.constexpr,
) -> tl.tensor:
    """What is cached there, but for the scales of heads. What is not there is not read: 0."""
    is_there = is_token[:, None] & is_dim[None, :]
    if INT4_GROUP:
        # As `Int4Cache` has them. A byte is asked for twice, and read once from memory.
        groups: tl.constexpr = HEAD_DIM // INT4_GROUP
        group, half = dims % groups, HEAD_DIM // 2
        packed = tl.load(numbers + (heads * half)[:, None] + (dims % half)[None, :], is_there, 0)
        steps = (packed.to(tl.int32) >> (dims // half * 4)[None, :]) & 15
        own = scales + heads * (4 + 2 * groups)
        largest = own.to(tl.pointer_type(tl.float16))
        step_unit = tl.load(largest, is_token, 0.0).to(tl.float32) / 128
        lowest_unit = tl.load(largest + 1, is_token, 0.0).to(tl.float32) / 128
        shares = (own + 4)[:, None] + group[None, :]
        step = tl.load(shares, is_there, 0).to(tl.float32) * step_unit[:, None]
        lowest = tl.load(shares + groups, is_there, 0).to(tl.float32) * lowest_unit[:, None]
        rows = steps.to(tl.float32) * step + lowest
    elif HAS_SCALES:
        there = numbers + (heads * HEAD_DIM)[:, None] + dims[None, :]
        rows = tl.where(is_there, tl.load(there, mask=is_there).to(tl.float32), 0.0)
    else:
        there = numbers + (heads * HEAD_DIM)[:, None] + dims[None, :]
        rows = tl.load(there, mask=is_there, other=0.0)
    return rows


@triton.jit(do_not_specialize=["table_width"])  # type: ignore[untyped-decorator]
def _attend_tile(  # noqa: PLR0913, PLR0915, PLR0917
    queries: tl.tensor,  # (T, H, HEAD_DIM)
    keys: tl.tensor,  # (num_blocks, BLOCK_SIZE, Hkv, HEAD_DIM), of int4 half as many bytes.
    values: tl.tensor,
    key_scales: tl.tensor,  # (num_blocks, BLOCK_SIZE, Hkv, …), of numbers that have scales only.
    value_scales: tl.tensor,
    tiles: tl.tensor,  # (tiles, 4): see `_cut_into_tiles`. If IS_DECODE, the lengths: (T,)
    table_rows: tl.tensor,  # (T,): which row of the table each sequence has, if IS_DECODE.
    table: tl.tensor,  # (rows, table_width)
    mixed: tl.tensor,  # (T, shares, H, HEAD_DIM): the result of each share of the tokens ...
    log_totals: tl.tensor,  # (T, shares, H): ... and the log2 of how much it weighs, of several.
    table_width: tl.tensor,
    scale: tl.tensor,  # Of scores whose softmax has the base 2.
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # The query heads that share a key/value head.
    SIDE: tl.constexpr,  # A power of two that holds GROUP for each row of a tile.
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # The power of two that holds them.
    KEYS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_SCALES: tl.constexpr,  # One for each head of a token.
    INT4_GROUP: tl.constexpr,  # The numbers of a head that share a step, of int4; else 0.
    IS_SHARED: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One program: one tile, one key/value head, one share of the tokens that the tile sees."""
    wait_for_last(OVERLAPS)
    tile, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_shares = tl.num_programs(1), tl.num_programs(2)
    if IS_DECODE:
        first_row, num_rows = tile, 1
        length = tl.load(tiles + tile).to(tl.int32)
        table_row = tl.load(table_rows + tile)
    else:
        first_row, num_rows = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
        length = tl.load(tiles + tile * 4 + 2)
        table_row = tl.load(tiles + tile * 4 + 3)
    own_table = table + table_row.to(tl.int64) * table_width
    row, dims = tl.arange(0, SIDE) // GROUP, tl.arange(0, DIMS)
    head = kv_head * GROUP + tl.arange(0, SIDE) % GROUP
    num_heads = num_kv_heads * GROUP
    is_row, is_dim = row < num_rows, dims < HEAD_DIM
    is_query = is_row[:, None] & is_dim[None, :]
    step_row = (first_row + row).to(tl.int64)
    # Which number of a head a cached one is: see `Int4Cache`.
    places = dims
    if INT4_GROUP:
        places = dims % (HEAD_DIM // INT4_GROUP) * INT4_GROUP + dims // (HEAD_DIM // INT4_GROUP)
    here = (step_row * num_heads + head)[:, None] * HEAD_DIM + places[None, :]
    q = tl.load(queries + here, mask=is_query, other=0.0)

    position = length - num_rows + row
    share_size = tl.maximum(tl.cdiv(length, num_shares), MIN_SHARE)
    first = share * share_size
    last = tl.minimum(first + share_size, length)
    # Softmax as the keys come in: the largest score so far, and sums that are relative to it. It
    # begins finite and below any score, for rows that see no key of this share.
    largest = tl.full((SIDE,), -1e30, tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    sums = tl.zeros((SIDE, DIMS), tl.float32)
    for start in range(first, last, KEYS):
        tokens = start + tl.arange(0, KEYS)
        is_token = tokens < last
        block = tl.load(own_table + tokens // BLOCK_SIZE, is_token, 0)
        slots = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        cached_heads = slots * num_kv_heads + kv_head
        k = _load_cached(
            keys, key_scales, cached_heads, dims, is_token, is_dim, HEAD_DIM, HAS_SCALES, INT4_GROUP
        ).to(q.dtype)
        v = _load_cached(
            values,
            value_scales,
            cached_heads,
            dims,
            is_token,
            is_dim,
            HEAD_DIM,
            HAS_SCALES,
            INT4_GROUP,
        ).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SCALES:
            scores *= tl.load(key_scales + cached_heads, mask=is_token, other=0.0)[None, :]
        is_seen = is_token[None, :] & (tokens[None, :] <= position[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, faded = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        total = total * faded + tl.sum(weights, 1)
        if HAS_SCALES:
            weights *= tl.load(value_scales + cached_heads, mask=is_token, other=0.0)[None, :]
        sums = sums * faded[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        largest = larger

    # What has seen no key has a total of 0 and weighs 2 ** -inf; all else has at least 1.
    if IS_SHARED:
        log_total = tl.where(total > 0, largest + tl.log2(tl.maximum(total, 1.0)), float("-inf"))
        tl.store(log_totals + (step_row * num_shares + share) * num_heads + head, log_total, is_row)
    at = ((step_row * num_shares + share) * num_heads + head)[:, None] * HEAD_DIM + places[None, :]
    tl.store(mixed + at, sums / tl.maximum(total, 1.0)[:, None], mask=is_query)


@triton.jit(do_not_specialize=["num_shares"])  # type: ignore[untyped-decorator]
def _join_shares(  # noqa: PLR0917
    mixed: tl.tensor,  # As in `_attend_tile`.
    log_totals: tl.tensor,
    attended: tl.tensor,  # (T, H, head_dim)
    num_shares: tl.tensor,
    head_dim: tl.tensor,
    DIMS: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One program: one row, one query head; its shares by their weights."""
    wait_for_last(OVERLAPS)
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    dims = tl.arange(0, DIMS)
    is_dim = dims < head_dim
    # Finite, and below any score: what is -inf weighs nothing beside it.
    largest, total, sums = -1e30, 0.0, tl.zeros((DIMS,), tl.float32)
    for start in range(0, num_shares, SHARES):
        shares = start + tl.arange(0, SHARES)
        is_share = shares < num_shares
        at = (row * num_shares + shares) * num_heads + head
        log_total = tl.load(log_totals + at, mask=is_share, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(log_total, 0))
        weights, faded = tl.exp2(log_total - larger), tl.exp2(largest - larger)
        is_there = is_share[:, None] & is_dim[None, :]
        part = tl.load(mixed + at[:, None] * head_dim + dims[None, :], mask=is_there, other=0.0)
        total = total * faded + tl.sum(weights, 0)
        sums = sums * faded + tl.sum(part * weights[:, None], 0)
        largest = larger
    out = (row * num_heads + head) * head_dim + dims
    tl.store(attended + out, sums / tl.maximum(total, 1e-30), mask=is_dim)
