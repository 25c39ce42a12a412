"""The numbers of a stored weight on CUDA, on their way into registers, by Triton.

Owns   how each layout is read: widened to float32, less zero points, with the scales beside.
Takes  the parts of a `StoredWeight` (weight_triton.py), and which tile of it a program wants.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigpt4_runtime.kernels.launching import fetch_ahead
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")


@triton.jit  # type: ignore[untyped-decorator]
def _nibble(words: tl.tensor, zero: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """The number of 4 bits at a place of each word, as a float from -8 to 7."""
    # Where it is, it becomes the last bits of 2**(23 - 4 * PLACE), which floats next to it hold
    # exactly: a conversion is slower, and so is to move each number. What is too far up is moved.
    NEAR: tl.constexpr = PLACE if PLACE < 5 else PLACE - 4
    near = words if PLACE < 5 else words >> 16
    # One instruction, which takes one constant of its own: so the other is not one.
    bits = (near & (15 << (4 * NEAR))) | (((150 - 4 * NEAR) << 23) - zero)
    return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - 4 * NEAR) + 8.0)


@triton.jit  # type: ignore[untyped-decorator]
def _whole(numbers: tl.tensor) -> tl.tensor:
    """Bytes from -128 to 127 as float32, as above."""
    bits = numbers.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit  # type: ignore[untyped-decorator]
def _float8(numbers: tl.tensor) -> tl.tensor:
    """Bytes of e4m3 as float32. A NaN comes out as 480: its row's scale is NaN then."""
    # The bits of float32, whose exponents are 120 larger: all GPUs can do that, and it is exact.
    bits = (numbers.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    return bits.to(tl.float32, bitcast=True) * (2.0**120)


@triton.jit  # type: ignore[untyped-decorator]
def _kept(pairs: tl.tensor, places: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """The number at a place of each four, of which a pair is kept."""
    first, second = ((pairs << 24) >> 24), (pairs >> 8)
    chosen = tl.where((places >> 2) == PLACE, second, 0)
    return tl.where((places & 3) == PLACE, first, chosen).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def fetch_rows(  # noqa: PLR0917
    numbers: tl.tensor,
    first: tl.tensor,  # The first output of a program.
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FETCHED: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Ask for the beginning of a program's rows."""
    IS_HALVED: tl.constexpr = LAYOUT == "int4" or LAYOUT == "sparse24"
    BITS: tl.constexpr = 4 if IS_HALVED else numbers.dtype.element_ty.primitive_bitwidth
    row_bytes = num_inputs * BITS // 8
    own = numbers.to(tl.pointer_type(tl.uint8)) + first.to(tl.int64) * row_bytes
    fetch_ahead(own, row_bytes, tl.minimum(num_outputs - first, OUTPUTS), FETCHED, OVERLAPS)


@triton.jit  # type: ignore[untyped-decorator]
def _load_numbers(  # noqa: PLR0917
    numbers: tl.tensor,
    places: tl.tensor,
    outputs: tl.tensor,  # (OUTPUTS,) int64: which ones, and whether they are there.
    is_output: tl.tensor,
    first: tl.tensor,  # The first input.
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """The numbers (OUTPUTS, INPUTS) of a tile without their scales, as float32."""
    PER_ITEM: tl.constexpr = 8 if LAYOUT == "int4" else 4 if LAYOUT == "sparse24" else 1
    width = num_inputs // PER_ITEM
    columns = first // PER_ITEM + tl.arange(0, INPUTS // PER_ITEM)
    at = outputs[:, None] * width + columns[None, :]
    is_there = is_output[:, None] & (columns < width)[None, :]
    items = tl.load(numbers + at, is_there, 0)
    if LAYOUT == "int8":
        found = _whole(items)
    elif LAYOUT == "float":
        found = items.to(tl.float32)
    elif LAYOUT == "float8":
        found = _float8(items)
    elif LAYOUT == "int4":
        # Number 8j + i is bits 4i to 4i + 3 of word j. No grid here has a third side.
        zero = tl.program_id(2)
        even = tl.interleave(
            tl.interleave(_nibble(items, zero, 0), _nibble(items, zero, 4)),
            tl.interleave(_nibble(items, zero, 2), _nibble(items, zero, 6)),
        )
        odd = tl.interleave(
            tl.interleave(_nibble(items, zero, 1), _nibble(items, zero, 5)),
            tl.interleave(_nibble(items, zero, 3), _nibble(items, zero, 7)),
        )
        found = tl.interleave(even, odd)
    else:
        # A byte has the places of two fours.
        both = tl.load(places + (at // 2), is_there, 0).to(tl.int32)
        own, pairs = (both >> (4 * (at % 2)).to(tl.int32)) & 15, items.to(tl.int32)
        found = tl.interleave(
            tl.interleave(_kept(pairs, own, 0), _kept(pairs, own, 2)),
            tl.interleave(_kept(pairs, own, 1), _kept(pairs, own, 3)),
        )
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _find_groups(
    first: tl.tensor, num_inputs: tl.tensor, GROUP: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The group of each chunk of a tile; past the end it is the last one."""
    chunks = first // CHUNK + tl.arange(0, CHUNKS)
    if GROUP is None:
        groups = chunks * 0
    else:
        groups = tl.minimum(chunks * CHUNK // GROUP, num_inputs // GROUP - 1)
    return groups


@triton.jit  # type: ignore[untyped-decorator]
def _load_zeros(  # noqa: PLR0917
    zeros: tl.tensor,
    outputs: tl.tensor,
    is_output: tl.tensor,
    groups: tl.tensor,
    num_groups: tl.tensor,
    LAYOUT: tl.constexpr,
) -> tl.tensor:
    """The zero points (OUTPUTS, chunks), as float32."""
    if LAYOUT == "int4":  # Packed over the outputs.
        at = (outputs // 8)[:, None] * num_groups + groups[None, :]
        words = tl.load(zeros + at, is_output[:, None], 0)
        found = ((words >> (4 * (outputs % 8)).to(tl.int32)[:, None]) & 15) - 8
    else:
        found = tl.load(
            zeros + outputs[:, None] * num_groups + groups[None, :], is_output[:, None], 0
        )
    return found.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def load_chunks(  # noqa: PLR0913, PLR0917
    numbers: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    places: tl.tensor,
    outputs: tl.tensor,
    is_output: tl.tensor,
    first: tl.tensor,
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Numbers less their zero points (OUTPUTS, chunks, CHUNK), and scales (OUTPUTS, chunks).

    Floats have none, and get zeros.
    """
    CHUNKS: tl.constexpr = INPUTS // CHUNK
    groups = _find_groups(first, num_inputs, GROUP, CHUNKS, CHUNK)
    num_groups = 1 if GROUP is None else num_inputs // GROUP
    at = outputs[:, None] * num_groups + groups[None, :]
    if scales is None:
        scale = tl.zeros((OUTPUTS, CHUNKS), tl.float32)
    else:
        scale = tl.load(scales + at, is_output[:, None], 0.0).to(tl.float32)
    # Of several loads the compiler keeps the last one's order in registers, and moves the others.
    found = _load_numbers(numbers, places, outputs, is_output, first, num_inputs, LAYOUT, INPUTS)
    found = tl.reshape(found, (OUTPUTS, CHUNKS, CHUNK))
    if zeros is not None:
        found -= _load_zeros(zeros, outputs, is_output, groups, num_groups, LAYOUT)[:, :, None]
    return found, scale
