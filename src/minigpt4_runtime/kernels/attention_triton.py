"""Causal attention for CUDA: rows that decode in one Triton kernel, prompts as in attention_sdpa.

Owns   the kernels, and the number of shares into which they cut long contexts.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies the keys of a sequence that decodes, nor asks the GPU for anything while it attends.
       What it launches for rows that decode depends on no length, so that a graph can hold it.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import CacheShape, FloatCache, Fp8Cache, Int8Cache
from minigpt4_runtime.kernels.attention_sdpa import Decode, Singles, attend_with
from minigpt4_runtime.kernels.contracts import KernelLimits, StepBatch
from minigpt4_runtime.model.llama import Attend
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

# The smallest side of a matrix that tensor cores multiply.
_MIN_SIDE = 16
_KEYS_AT_ONCE = 32
_SHARES_AT_ONCE = 16
# A context is cut so that about so many programs run, but into no smaller shares than this.
_WANTED_PROGRAMS = 256
_MIN_SHARE = 128


class TritonAttention:
    """See `AttentionKernel`."""

    limits: ClassVar = KernelLimits(formats=(FloatCache, Int8Cache, Fp8Cache))
    is_capturable: ClassVar = True

    def __init__(self, cache: FloatCache | Int8Cache | Fp8Cache) -> None:
        self._cache = cache
        device = cache.device
        self._is_current = device.type == "cpu" or device.index == torch.cuda.current_device()

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        return attend_with(self._cache, batch, self._decoding)

    def _decoding(self, singles: Singles) -> Decode:
        """The grid follows from what a row of the table can hold: the GPU reads the lengths."""
        shape, count = self._cache.shape, len(singles.lengths)
        most_tokens = singles.block_table.shape[1] * shape.block_size
        wanted = -(-_WANTED_PROGRAMS // (count * shape.num_heads))
        shares = min(wanted, -(-most_tokens // _MIN_SHARE))
        grid = (count, shape.num_heads, shares)

        def decode(layer: int, q: Tensor) -> Tensor:
            q = q.contiguous()
            attended = torch.empty_like(q)
            mixed, log_totals = attended, attended
            if shares > 1:
                mixed = q.new_empty(count, shares, *q.shape[1:], dtype=torch.float32)
                log_totals = q.new_empty(count, shares, q.shape[1], dtype=torch.float32)
            # Triton launches on the current device, wherever the tensors are.
            with nullcontext() if self._is_current else torch.cuda.device(q.device):
                _attend_share[grid](
                    q, *self._sides(layer), singles.lengths, singles.table_rows,
                    singles.block_table, mixed, log_totals, singles.block_table.shape[1],
                    q.shape[2] ** -0.5,
                    **_sizes(q, shape, has_scales=not isinstance(self._cache, FloatCache)),
                    IS_SHARED=shares > 1, num_stages=2,
                )  # fmt: skip
                if shares > 1:
                    _join_shares[q.shape[:2]](
                        mixed, log_totals, attended, shares, q.shape[2],
                        DIMS=triton.next_power_of_2(q.shape[2]), SHARES=_SHARES_AT_ONCE,
                    )  # fmt: skip
            return attended

        return decode

    def _sides(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A layer's keys and values, and the scales of both, which floats do not have."""
        cache = self._cache
        if isinstance(cache, FloatCache):
            keys, values = cache.keys[layer], cache.values[layer]
            return keys, values, keys, values
        (keys, values), (key_scales, value_scales) = cache.numbers[layer], cache.scales[layer]
        return keys, values, key_scales, value_scales


def _sizes(q: Tensor, shape: CacheShape, *, has_scales: bool) -> dict[str, int]:
    """The sizes that the kernel is compiled for."""
    group = q.shape[1] // shape.num_heads
    return {
        "BLOCK_SIZE": shape.block_size,
        "GROUP": group,
        "ROWS": max(_MIN_SIDE, triton.next_power_of_2(group)),
        "HEAD_DIM": shape.head_dim,
        "DIMS": max(_MIN_SIDE, triton.next_power_of_2(shape.head_dim)),
        "KEYS": _KEYS_AT_ONCE,
        "MIN_SHARE": _MIN_SHARE,
        "HAS_SCALES": has_scales,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _load_cached(
    numbers: tl.tensor,  # Where they lie: (KEYS, DIMS)
    scales: tl.tensor,  # Likewise: (KEYS,)
    is_there: tl.tensor,
    is_token: tl.tensor,
    HAS_SCALES: tl.constexpr,
) -> tl.tensor:
    """What is cached there, as floats. What is not there is not read, and is 0."""
    if HAS_SCALES:
        rows = tl.load(numbers, mask=is_there).to(tl.float32)
        rows *= tl.load(scales, mask=is_token, other=0.0)[:, None]
        rows = tl.where(is_there, rows, 0.0)
    else:
        rows = tl.load(numbers, mask=is_there, other=0.0)
    return rows


@triton.jit(do_not_specialize=["table_width"])  # type: ignore[untyped-decorator]
def _attend_share(  # noqa: PLR0913, PLR0915, PLR0917
    queries: tl.tensor,  # (B, H, HEAD_DIM)
    keys: tl.tensor,  # (num_blocks, BLOCK_SIZE, Hkv, HEAD_DIM)
    values: tl.tensor,
    key_scales: tl.tensor,  # (num_blocks, BLOCK_SIZE, Hkv), of numbers that have scales only.
    value_scales: tl.tensor,
    lengths: tl.tensor,  # (B,)
    table_rows: tl.tensor,  # (B,): which row of the block table each sequence has.
    table: tl.tensor,  # (rows, table_width)
    mixed: tl.tensor,  # (B, shares, H, HEAD_DIM): the result of each share of the tokens ...
    log_totals: tl.tensor,  # (B, shares, H): ... and the log of how much it weighs, of several.
    table_width: tl.tensor,
    scale: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # The query heads that share a key/value head ...
    ROWS: tl.constexpr,  # ... and the power of two that holds them.
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # Likewise.
    KEYS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_SHARED: tl.constexpr,
) -> None:
    """One program: one sequence, one key/value head, one share of the sequence's tokens."""
    sequence, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_shares = tl.num_programs(1), tl.num_programs(2)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_row, is_dim = rows < GROUP, dims < HEAD_DIM
    heads = kv_head * GROUP + rows
    num_heads = num_kv_heads * GROUP
    here = (sequence * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(queries + here, mask=is_row[:, None] & is_dim[None, :], other=0.0)

    length = tl.load(lengths + sequence).to(tl.int32)
    own_table = table + tl.load(table_rows + sequence) * table_width
    share_size = tl.maximum(tl.cdiv(length, num_shares), MIN_SHARE)
    first = share * share_size
    last = tl.minimum(first + share_size, length)
    # Softmax as the keys come in: the largest score so far, and sums that are relative to it.
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIMS), tl.float32)
    for start in range(first, last, KEYS):
        tokens = start + tl.arange(0, KEYS)
        is_token = tokens < last
        block = tl.load(own_table + tokens // BLOCK_SIZE, is_token, 0)
        slots = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        cached_heads = slots * num_kv_heads + kv_head
        there = (cached_heads * HEAD_DIM)[:, None] + dims[None, :]
        is_there = is_token[:, None] & is_dim[None, :]
        k = _load_cached(keys + there, key_scales + cached_heads, is_there, is_token, HAS_SCALES)
        v = _load_cached(
            values + there, value_scales + cached_heads, is_there, is_token, HAS_SCALES
        )
        k, v = k.to(q.dtype), v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        faded = tl.exp(largest - larger)
        total = total * faded + tl.sum(weights, 1)
        sums = sums * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger

    # An empty share has a total of 0 and weighs exp(-inf); every other has at least 1.
    total = tl.maximum(total, 1.0)
    at = (sequence * num_shares + share) * num_heads + heads
    if IS_SHARED:
        tl.store(log_totals + at, largest + tl.log(total), mask=is_row)
    out = at[:, None] * HEAD_DIM + dims[None, :]
    tl.store(mixed + out, sums / total[:, None], mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_shares"])  # type: ignore[untyped-decorator]
def _join_shares(  # noqa: PLR0917
    mixed: tl.tensor,  # As in `_attend_share`.
    log_totals: tl.tensor,
    attended: tl.tensor,  # (B, H, head_dim)
    num_shares: tl.tensor,
    head_dim: tl.tensor,
    DIMS: tl.constexpr,
    SHARES: tl.constexpr,
) -> None:
    """One program: one sequence, one query head; its shares by their weights."""
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
        weights, faded = tl.exp(log_total - larger), tl.exp(largest - larger)
        is_there = is_share[:, None] & is_dim[None, :]
        part = tl.load(mixed + at[:, None] * head_dim + dims[None, :], mask=is_there, other=0.0)
        total = total * faded + tl.sum(weights, 0)
        sums = sums * faded + tl.sum(part * weights[:, None], 0)
        largest = larger
    out = (row * num_heads + head) * head_dim + dims
    tl.store(attended + out, sums / tl.maximum(total, 1e-30), mask=is_dim)
