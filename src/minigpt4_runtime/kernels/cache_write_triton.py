"""New queries, keys and values on CUDA: turned by their positions and cached, in one launch.

Owns   the kernel, which writes every format of the cache as `KeyValueCache.write` does.
Takes  rows of heads, and the rotation of the step; gives the turned queries.
Never  asks the GPU for anything, so that a step can be captured as a graph.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import FloatCache, Fp8Cache, Int4Cache, Int8Cache
from minigpt4_runtime.cache.sizes import int4_group
from minigpt4_runtime.kernels.launching import on_device_of, overlapping, wait_for_last
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

TritonCache = FloatCache | Int8Cache | Int4Cache | Fp8Cache
# A program has so many key heads of a row: one row of a 7B then has eight programs.
_HEADS_AT_ONCE = 4
# As in `QuantisedCache`, in place of a scale of 0.
_SMALLEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
# Next to 1.5 · 2**23 floats are whole numbers, and additions round to the nearest even one.
_ROUNDING: tl.constexpr = tl.constexpr(12582912.0)


def turn_and_write(  # noqa: PLR0917 - a layer's rows.
    cache: TritonCache,
    layer: int,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation | None,
) -> Tensor:
    """(T, H, D) queries → turned; (T, Hkv, D) keys, turned, and values go to (T,) slots.

    Without a rotation they are turned already. Of one product, rows lie further apart than they are
    long.
    """
    q, k, v = (each if each[0].is_contiguous() else each.contiguous() for each in (q, k, v))
    cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
    turned = q.contiguous() if rotation is None else q.new_empty(q.shape)
    num_heads = cache.shape.num_heads
    sizes = write_sizes(cache, q.shape[1] // num_heads)
    centre = None
    if not isinstance(cache, FloatCache) and cache.key_centre is not None:
        centre = cache.key_centre[layer]
    with on_device_of(q):
        _turn_and_write[(len(q), triton.cdiv(num_heads, sizes["HEADS"]))](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), cos, sin, slots, turned,
            *sides_of(cache, layer), centre, num_heads, **sizes, **overlapping(q.device),
        )  # fmt: skip
    return turned


def sides_of(cache: TritonCache, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's keys and values, and the scales of both, which floats do not have."""
    if isinstance(cache, FloatCache):
        keys, values = cache.keys[layer], cache.values[layer]
        return keys, values, keys, values
    (keys, values), (key_scales, value_scales) = cache.numbers[layer], cache.scales[layer]
    return keys, values, key_scales, value_scales


def format_of(cache: TritonCache) -> dict[str, bool | int]:
    """What kernels are compiled for: how they read and write this cache."""
    return {
        "HAS_SCALES": not isinstance(cache, FloatCache | Int4Cache),
        "INT4_GROUP": int4_group(cache.shape.head_dim) if isinstance(cache, Int4Cache) else 0,
    }


def write_sizes(cache: TritonCache, group: int) -> dict[str, bool | int]:
    """What the kernel is compiled for; `group` query heads share a key head."""
    shape = cache.shape
    return {
        "HEADS": min(_HEADS_AT_ONCE, triton.next_power_of_2(shape.num_heads)),
        "GROUP": group, "HEAD_DIM": shape.head_dim,
        "DIMS": triton.next_power_of_2(shape.head_dim), **format_of(cache),
    }  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _turned(  # noqa: PLR0917
    rows: tl.tensor,
    first: tl.tensor,  # (HEADS,): where each head begins.
    dims: tl.tensor,  # Which of its numbers.
    is_there: tl.tensor,  # (HEADS, dims)
    cos: tl.tensor,  # Of the row: (HEAD_DIM,), or None. Both as `Rotation` has them.
    sin: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Heads in their dtype, rounded where `Rotation` rounds them."""
    found = tl.load(rows + first[:, None] + dims[None, :], is_there, 0.0)
    if cos is not None:
        across = (dims + HEAD_DIM // 2) % HEAD_DIM
        swapped = tl.load(rows + first[:, None] + across[None, :], is_there, 0.0).to(tl.float32)
        is_dim = dims < HEAD_DIM
        straight = found.to(tl.float32) * tl.load(cos + dims, is_dim, 0.0).to(tl.float32)[None, :]
        swapped *= tl.load(sin + dims, is_dim, 0.0).to(tl.float32)[None, :]
        found = (straight.to(found.dtype).to(tl.float32) + swapped).to(found.dtype)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _centred(  # noqa: PLR0913, PLR0917
    rows: tl.tensor,
    first: tl.tensor,
    heads: tl.tensor,  # (HEADS,)
    dims: tl.tensor,
    is_there: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    centre: tl.tensor,  # (all heads, HEAD_DIM), or None.
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """The same as float32, as differences from the centre."""
    found = _turned(rows, first, dims, is_there, cos, sin, HEAD_DIM).to(tl.float32)
    if centre is not None:
        found -= tl.load(centre + (heads * HEAD_DIM)[:, None] + dims[None, :], is_there, 0.0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _steps(numbers: tl.tensor, lowest: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Whole numbers from 0 to 15."""
    found = tl.div_rn(numbers - lowest, tl.maximum(step, _SMALLEST) + tl.zeros_like(numbers))
    found = (found + _ROUNDING) - _ROUNDING
    return tl.minimum(tl.maximum(found, 0.0), 15.0).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def _widest_step(group: tl.tensor, lowest: tl.tensor) -> tl.tensor:
    """A fifteenth of a group's spread: (HEADS, ALL, INT4_GROUP) → (HEADS, ALL, 1)."""
    # A step that is not finite makes all of its head so: min and max would pass over NaN.
    tops = tl.where(group == group, group, float("inf"))
    spread = tl.max(tops, 2, keep_dims=True) - lowest
    return tl.div_rn(spread, tl.full(spread.shape, 15.0, tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _write_unit(
    there: tl.tensor,  # (HEADS,) float16
    is_head: tl.tensor,
    wanted: tl.tensor,  # (HEADS, ALL, 1)
) -> tl.tensor:
    """Write 128/127 of the largest of a head; give a 128th of it: (HEADS, 1, 1)."""
    largest = tl.max(tl.max(wanted, 2), 1)
    largest = (largest * (128 / 127)).to(tl.float16)
    tl.store(there, largest, is_head)
    return (largest.to(tl.float32) / 128)[:, None, None]


@triton.jit  # type: ignore[untyped-decorator]
def _write_shares(
    there: tl.tensor,  # (HEADS, ALL) int8
    is_there: tl.tensor,
    wanted: tl.tensor,  # (HEADS, ALL, 1)
    unit: tl.tensor,  # (HEADS, 1, 1)
) -> tl.tensor:
    """Write in units what each group wants; give what it gets."""
    shares = tl.div_rn(wanted, tl.maximum(unit, _SMALLEST) + tl.zeros_like(wanted))
    shares = (shares + _ROUNDING) - _ROUNDING
    shares = tl.minimum(tl.maximum(tl.where(shares == shares, shares, 0.0), -127.0), 127.0)
    tl.store(there, tl.reshape(shares, is_there.shape).to(tl.int8), is_there)
    return shares * unit


@triton.jit  # type: ignore[untyped-decorator]
def _write_int4(  # noqa: PLR0913, PLR0917
    rows: tl.tensor,
    first: tl.tensor,
    heads: tl.tensor,
    is_head: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    centre: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    there: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    INT4_GROUP: tl.constexpr,
) -> None:
    """As `Int4Cache.pack` does: two numbers of a group share a byte."""
    ALL: tl.constexpr = DIMS // INT4_GROUP
    GROUPS: tl.constexpr = HEAD_DIM // INT4_GROUP
    dims, group = tl.arange(0, DIMS), tl.arange(0, ALL)
    is_there = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    is_group = is_head[:, None] & (group < GROUPS)[None, :]
    found = _centred(rows, first, heads, dims, is_there, cos, sin, centre, HEAD_DIM)
    found = tl.reshape(found, (HEADS, ALL, INT4_GROUP))
    lowest = tl.min(found, 2, keep_dims=True)
    step = _widest_step(found, lowest)
    own = scales + there * (4 + 2 * GROUPS)
    largest = own.to(tl.pointer_type(tl.float16))
    step_unit = _write_unit(largest, is_head, step)
    lowest_unit = _write_unit(largest + 1, is_head, tl.abs(lowest))
    # Rounded by the scales as they are stored.
    at = (own + 4)[:, None] + group[None, :]
    step = _write_shares(at, is_group, step, step_unit)
    lowest = _write_shares(at + GROUPS, is_group, lowest, lowest_unit)
    steps = tl.reshape(_steps(found, lowest, step), (HEADS, ALL, 2, INT4_GROUP // 2))
    packed = tl.sum(steps.to(tl.int32) << (tl.arange(0, 2) * 4)[None, None, :, None], 2)
    byte = group[:, None] + (tl.arange(0, INT4_GROUP // 2) * GROUPS)[None, :]
    at = (there * (HEAD_DIM // 2))[:, None, None] + byte[None, :, :]
    tl.store(numbers + at, packed.to(tl.uint8), is_group[:, :, None])


@triton.jit  # type: ignore[untyped-decorator]
def _write_side(  # noqa: PLR0913, PLR0917
    rows: tl.tensor,  # (T, all heads, HEAD_DIM)
    first: tl.tensor,
    heads: tl.tensor,
    is_head: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    centre: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    there: tl.tensor,  # (HEADS,): where each head goes, counted in heads through all slots.
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INT4_GROUP: tl.constexpr,
) -> None:
    """The keys, or the values, of one row."""
    if INT4_GROUP:
        _write_int4(
            rows, first, heads, is_head, cos, sin, centre, numbers, scales, there,
            HEADS, HEAD_DIM, DIMS, INT4_GROUP,
        )  # fmt: skip
    else:
        dims = tl.arange(0, DIMS)
        is_there = is_head[:, None] & (dims < HEAD_DIM)[None, :]
        at = (there * HEAD_DIM)[:, None] + dims[None, :]
        if HAS_SCALES:
            found = _centred(rows, first, heads, dims, is_there, cos, sin, centre, HEAD_DIM)
            LARGEST: tl.constexpr = 127.0 if numbers.dtype.element_ty == tl.int8 else 448.0
            # As above: a scale that is not finite.
            sizes = tl.where(found == found, tl.abs(found), float("inf"))
            largest = tl.max(sizes, 1)
            scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
            tl.store(scales + there, scale, is_head)
            divisor = tl.maximum(scale, _SMALLEST)[:, None] + tl.zeros_like(found)
            found = tl.div_rn(found, divisor)
            if LARGEST == 127.0:
                found = (found + _ROUNDING) - _ROUNDING
            else:  # What is a little larger would become NaN.
                found = tl.minimum(tl.maximum(found, -LARGEST), LARGEST)
        else:
            found = _turned(rows, first, dims, is_there, cos, sin, HEAD_DIM)
        tl.store(numbers + at, found.to(numbers.dtype.element_ty), is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _turn_and_write(  # noqa: PLR0913, PLR0917
    q: tl.tensor,  # (T, H, HEAD_DIM)
    k: tl.tensor,  # (T, Hkv, HEAD_DIM)
    v: tl.tensor,
    q_step: tl.tensor,  # From one row to the next.
    k_step: tl.tensor,
    v_step: tl.tensor,
    cos: tl.tensor,  # (T, HEAD_DIM), or None: nothing is turned.
    sin: tl.tensor,
    slots: tl.tensor,  # (T,)
    turned: tl.tensor,  # Like q, without gaps.
    keys: tl.tensor,  # A layer's, as in `sides_of`.
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    centre: tl.tensor,  # (Hkv, HEAD_DIM), or None.
    num_heads: tl.tensor,  # Hkv
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # The query heads that share a key head.
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # The power of two that holds them.
    HAS_SCALES: tl.constexpr,  # See `format_of`.
    INT4_GROUP: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One program: some key heads of one row, with their values and queries."""
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < num_heads
    if cos is not None:
        cos += row * HEAD_DIM
        sin += row * HEAD_DIM
        dims = tl.arange(0, DIMS)
        is_there = is_head[:, None] & (dims < HEAD_DIM)[None, :]
        for member in range(GROUP):
            first = (heads * GROUP + member) * HEAD_DIM
            found = _turned(q, row * q_step + first, dims, is_there, cos, sin, HEAD_DIM)
            first += row * (num_heads * GROUP * HEAD_DIM)
            tl.store(turned + first[:, None] + dims[None, :], found, is_there)
    first = heads * HEAD_DIM
    there = tl.load(slots + row) * num_heads + heads
    _write_side(
        k, row * k_step + first, heads, is_head, cos, sin, centre, keys, key_scales, there,
        HEADS, HEAD_DIM, DIMS, HAS_SCALES, INT4_GROUP,
    )  # fmt: skip
    _write_side(
        v, row * v_step + first, heads, is_head, None, None, None, values, value_scales, there,
        HEADS, HEAD_DIM, DIMS, HAS_SCALES, INT4_GROUP,
    )  # fmt: skip
