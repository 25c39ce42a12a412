"""Products that read a weight once on CUDA, by Triton: the kernels and their launches.

Owns   the product of a few rows with the numbers of a weight in registers (number_triton.py), and
       the weight widened for many rows.
Takes  rows (M, K) and a `StoredWeight`, whose parts stay as the model folder has them: a thread
       reads 16 neighbouring bytes of a row, and a warp a whole line, so no other order is faster.
Never  asks the GPU for anything, so that a step can be captured as a graph.

Checked under Triton's interpreter and compiler only: it has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from minigpt4_runtime.kernels.launching import on_device_of, overlapping, wait_for_last
from minigpt4_runtime.kernels.number_triton import fetch_rows, load_chunks
from minigpt4_runtime.kernels.rounding_triton import scale_of, sizes_of, steps_of
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = require("triton", install="pip install triton")
    tl = require("triton.language", install="pip install triton")

Layout = Literal["int8", "int4", "sparse24", "float8", "float"]
Rounding = Literal["int8", "float8"]
# How many numbers share what is loaded at once: a scale, and 16 or fewer bytes of the weight.
_CHUNK = {"int8": 16, "int4": 32, "sparse24": 16, "float8": 16, "float": 8}
# The smallest side of a matrix that tensor cores multiply.
_MIN_SIDE = 16
_MOST_ROWS_AT_ONCE = 64
# With about so many programs each multiprocessor has one; wider tiles read the rows less often.
_WANTED_PROGRAMS = 128
# What a program asks for before the kernel ahead has ended, of each row and in all. Those that fit
# on an H200 at once, 8 or 2 on a multiprocessor, then ask for 8 to 17 MB: what memory gives while a
# small kernel runs, and a third of the cache, so that the kernel ahead does not drive it out again.
_MOST_OF_ROW, _MOST_FETCHED = 2048, 2**15


@dataclass(frozen=True)
class StoredWeight:
    """The parts of a weight (N, K), contiguous.

    `numbers` are int8 (N, K); int32 (N, K / 8), eight of 4 bits each; int8 (N, K / 2), those that
    2:4 sparsity keeps, at `places`, uint8 (N, K / 8); floats of 8 bits as uint8 (N, K); or floats
    of the rows' dtype, which have no scales. `scales` are (N, groups). `zeros` are int8
    (N, groups), or of 4 bits in int32 (N / 8, groups).
    """

    layout: Layout
    numbers: Tensor
    scales: Tensor | None
    zeros: Tensor | None = None
    places: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """N."""
        return len(self.numbers)

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.numbers.shape[1] * {"int4": 8, "sparse24": 2}.get(self.layout, 1)

    @property
    def group_size(self) -> int | None:
        """How many numbers have a scale; None: a whole row."""
        num_groups = 1 if self.scales is None else self.scales.shape[1]
        return None if num_groups == 1 else self.num_inputs // num_groups

    def _arguments(self) -> tuple[Tensor | None, ...]:
        # A pair of kept numbers is read at once.
        is_sparse = self.layout == "sparse24"
        numbers = self.numbers.view(torch.int16) if is_sparse else self.numbers
        return numbers, self.scales, self.zeros, self.places

    def multiply_one(
        self, row: Tensor, bias: Tensor | None, *, rounding: Rounding | None = None
    ) -> Tensor:
        """(1, K) → (1, N), summed in float32. The row may be rounded as rounding_triton.py does."""
        product = row.new_empty(1, self.num_outputs)
        sizes = one_sizes(self.layout)
        with on_device_of(row):
            _multiply_one[(triton.cdiv(self.num_outputs, sizes["OUTPUTS"]),)](
                row, *self._arguments(), bias, product, self.num_outputs, self.num_inputs,
                LAYOUT=self.layout, GROUP=self.group_size, ROUNDING=rounding, **sizes,
                **overlapping(row.device),
            )  # fmt: skip
        return product

    def multiply_few(
        self,
        rows: Tensor,
        bias: Tensor | None,
        *,
        row_scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """(M, K) → (M, N), summed in float32. The weight is read once for each 64 rows.

        Rows of 8-bit floats come with `row_scales` (M, 1), and the `dtype` of the product.
        """
        product = rows.new_empty(len(rows), self.num_outputs, dtype=dtype)
        sizes = few_sizes(self.layout, rows, self.num_outputs)
        grid = (
            triton.cdiv(len(rows), sizes["ROWS"]),
            triton.cdiv(self.num_outputs, sizes["OUTPUTS"]),
        )
        with on_device_of(rows):
            _multiply_few[grid](
                rows, row_scales, *self._arguments(), bias, product, len(rows), self.num_outputs,
                self.num_inputs, LAYOUT=self.layout, GROUP=self.group_size, **sizes,
                **overlapping(rows.device),
            )  # fmt: skip
        return product

    def widen(self, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) of floats; in int8 its whole numbers, without scales."""
        shape = (self.num_outputs, self.num_inputs)
        matrix = torch.empty(shape, dtype=dtype, device=self.numbers.device)
        sizes = widen_sizes(self.layout)
        grid = (
            triton.cdiv(self.num_inputs, sizes["INPUTS"]),
            triton.cdiv(self.num_outputs, sizes["OUTPUTS"]),
        )
        with on_device_of(matrix):
            _widen[grid](
                *self._arguments(), matrix, *shape,
                LAYOUT=self.layout, GROUP=self.group_size, **sizes,
            )  # fmt: skip
        return matrix


def one_sizes(layout: Layout) -> dict[str, int]:
    """The tile of a program, for one row: 8 KiB of the weight. Each program sums over all inputs.

    A sum that several programs share needs a second launch, or additions whose order changes from
    run to run; narrow tiles give 500 programs or more for each of a 7B's products without.
    """
    chunk = _CHUNK[layout]
    return {
        "OUTPUTS": 8, "INPUTS": 64 * chunk, "CHUNK": chunk, "FETCHED": _MOST_OF_ROW, "num_warps": 4,
    }  # fmt: skip


def few_sizes(layout: Layout, rows: Tensor, num_outputs: int) -> dict[str, int]:
    """The same for some rows. It fits into the 99 KiB of shared memory that every GPU has."""
    tile = min(_MOST_ROWS_AT_ONCE, max(_MIN_SIDE, triton.next_power_of_2(len(rows))))
    outputs = 64 if num_outputs >= 64 * _WANTED_PROGRAMS else 32
    return {
        "ROWS": tile, "OUTPUTS": outputs, "INPUTS": 256 if tile == _MIN_SIDE else 128,
        "CHUNK": _CHUNK[layout], "FETCHED": min(_MOST_OF_ROW, _MOST_FETCHED // outputs),
        "num_warps": 4, "num_stages": 4 if rows.element_size() <= 2 else 2,
    }  # fmt: skip


def widen_sizes(layout: Layout) -> dict[str, int]:
    """The tile of a program."""
    return {"OUTPUTS": 8, "INPUTS": 512, "CHUNK": _CHUNK[layout], "num_warps": 4}


@triton.jit  # type: ignore[untyped-decorator]
def _find_row_scale(
    row: tl.tensor, num_inputs: tl.tensor, INPUTS: tl.constexpr, IS_FLOAT: tl.constexpr
) -> tl.tensor:
    """The scale that a whole row (K,) is rounded by."""
    largest = tl.zeros((INPUTS,), tl.float32)
    for first in range(0, num_inputs, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        some = tl.load(row + inputs, inputs < num_inputs, 0.0).to(tl.float32)
        largest = tl.maximum(largest, sizes_of(some))
    return scale_of(tl.max(largest, 0), IS_FLOAT)


@triton.jit  # type: ignore[untyped-decorator]
def _round_some(
    some: tl.tensor,  # (INPUTS,) of a row.
    row_scale: tl.tensor,  # Of the whole row, where GROUP is None.
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    ROUNDING: tl.constexpr,
) -> tl.tensor:
    """As `_round_rows` does it; 8-bit floats without their scale."""
    IS_FLOAT: tl.constexpr = ROUNDING == "float8"
    SIZE: tl.constexpr = INPUTS if GROUP is None else GROUP
    groups = tl.reshape(some.to(tl.float32), (INPUTS // SIZE, SIZE))
    if GROUP is not None:
        row_scale = scale_of(tl.max(sizes_of(groups), 1, keep_dims=True), IS_FLOAT)
    found = steps_of(groups, row_scale, IS_FLOAT)
    if IS_FLOAT:
        found = found.to(tl.float8e4nv).to(tl.float32)
    else:
        found = (found * row_scale).to(some.dtype).to(tl.float32)
    return tl.reshape(found, (INPUTS,))


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_one(  # noqa: PLR0913, PLR0917
    row: tl.tensor,  # (K,)
    numbers: tl.tensor,  # These four as in StoredWeight; some may be None.
    scales: tl.tensor,
    zeros: tl.tensor,
    places: tl.tensor,
    bias: tl.tensor,  # (N,) or None
    product: tl.tensor,  # (N,)
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # The numbers that have a scale; None: a whole row.
    ROUNDING: tl.constexpr,  # How the row is rounded, or None.
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    FETCHED: tl.constexpr,  # Bytes of each row: see `fetch_ahead`.
    OVERLAPS: tl.constexpr,
) -> None:
    """One program: some outputs, all inputs, summed by threads."""
    first_output = tl.program_id(0) * OUTPUTS
    fetch_rows(numbers, first_output, num_outputs, num_inputs, LAYOUT, OUTPUTS, FETCHED, OVERLAPS)
    wait_for_last(OVERLAPS)
    CHUNKS: tl.constexpr = INPUTS // CHUNK
    outputs = (first_output + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_output = outputs < num_outputs
    row_scale = 0.0
    if ROUNDING is not None and GROUP is None:
        row_scale = _find_row_scale(row, num_inputs, INPUTS, ROUNDING == "float8")
    shared = tl.zeros((OUTPUTS, CHUNKS), tl.float32)
    # Asked for by name, two tiles are on their way while one is multiplied: without a product for
    # tensor cores the compiler would not see to it.
    for first in tl.range(0, num_inputs, INPUTS, num_stages=3):
        inputs = first + tl.arange(0, INPUTS)
        some = tl.load(row + inputs, inputs < num_inputs, 0.0)
        if ROUNDING is not None:
            some = _round_some(some, row_scale, GROUP, INPUTS, ROUNDING)
        found, scale = load_chunks(
            numbers, scales, zeros, places, outputs, is_output, first, num_inputs,
            LAYOUT, GROUP, OUTPUTS, INPUTS, CHUNK,
        )  # fmt: skip
        sums = tl.sum(found * tl.reshape(some.to(tl.float32), (1, CHUNKS, CHUNK)), 2)
        shared += sums if GROUP is None else sums * scale
    total = tl.sum(shared, 1)
    if GROUP is None and scales is not None:
        total *= tl.load(scales + outputs, is_output, 0.0)
    if ROUNDING == "float8":
        total *= row_scale
    if bias is not None:
        total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)
    tl.store(product + outputs, total.to(product.dtype.element_ty), is_output)


# Specialised, it would be compiled anew for counts that 16 divides, in the midst of answers.
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _multiply_few(  # noqa: PLR0913, PLR0917
    rows: tl.tensor,  # (M, K)
    row_scales: tl.tensor,  # (M,) for rows of 8-bit floats, or None.
    numbers: tl.tensor,  # These four as in StoredWeight; two may be None.
    scales: tl.tensor,
    zeros: tl.tensor,
    places: tl.tensor,
    bias: tl.tensor,  # (N,) or None
    product: tl.tensor,  # (M, N)
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # The numbers that have a scale; None: a whole row.
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    FETCHED: tl.constexpr,  # Bytes of each row: see `fetch_ahead`.
    OVERLAPS: tl.constexpr,
) -> None:
    """One program: some rows, some outputs, all inputs, summed by tensor cores."""
    first_output = tl.program_id(1) * OUTPUTS
    fetch_rows(numbers, first_output, num_outputs, num_inputs, LAYOUT, OUTPUTS, FETCHED, OVERLAPS)
    wait_for_last(OVERLAPS)
    outputs = (first_output + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_output = outputs < num_outputs
    own_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(0, num_inputs, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        at = own_rows[None, :] * num_inputs + inputs[:, None]
        is_there = (own_rows < num_rows)[None, :] & (inputs < num_inputs)[:, None]
        if row_scales is None:
            some = tl.load(rows + at, is_there, 0.0)
        else:  # A float16 holds them all.
            some = tl.load(rows + at, mask=is_there).to(tl.float16)
            some = tl.where(is_there, some, 0.0)
        found, scale = load_chunks(
            numbers, scales, zeros, places, outputs, is_output, first, num_inputs,
            LAYOUT, GROUP, OUTPUTS, INPUTS, CHUNK,
        )  # fmt: skip
        if GROUP is not None:
            found *= scale[:, :, None]
        weight = tl.reshape(found, (OUTPUTS, INPUTS)).to(some.dtype)
        total = tl.dot(weight, some, total, input_precision="ieee")
    if GROUP is None:
        total *= tl.load(scales + outputs, is_output, 0.0)[:, None]
    if row_scales is not None:
        total *= tl.load(row_scales + own_rows, own_rows < num_rows, 0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[:, None]
    at = own_rows[None, :] * num_outputs + outputs[:, None]
    is_there = is_output[:, None] & (own_rows < num_rows)[None, :]
    tl.store(product + at, total.to(product.dtype.element_ty), is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _widen(  # noqa: PLR0913, PLR0917
    numbers: tl.tensor,  # These four as in StoredWeight; two may be None.
    scales: tl.tensor,
    zeros: tl.tensor,
    places: tl.tensor,
    matrix: tl.tensor,  # (N, K) floats, or int8: whole numbers without scales.
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    first = tl.program_id(0) * INPUTS
    outputs = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_output = outputs < num_outputs
    found, scale = load_chunks(
        numbers, scales, zeros, places, outputs, is_output, first, num_inputs,
        LAYOUT, GROUP, OUTPUTS, INPUTS, CHUNK,
    )  # fmt: skip
    if matrix.dtype.element_ty != tl.int8:
        found *= scale[:, :, None]
    inputs = first + tl.arange(0, INPUTS)
    is_there = is_output[:, None] & (inputs < num_inputs)[None, :]
    at = outputs[:, None] * num_inputs + inputs[None, :]
    widened = tl.reshape(found, (OUTPUTS, INPUTS)).to(matrix.dtype.element_ty)
    tl.store(matrix + at, widened, is_there)
