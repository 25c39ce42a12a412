"""Weights as integers of 8 or 4 bits, with a scale for each output row or each group of inputs.

Owns   the formats w8a16, w8a8, w4a16 and w4a8, their groups and zero points; the plain product.
       Tensors are named and laid out as compressed-tensors has them: "int-quantized" for 8 bits,
       "pack-quantized" for 4.
Takes  a matrix of floats, or integers and scales that were found elsewhere; gives its parts.

A number stands for (integer - zero point) · scale; without a zero point for integer · scale.
"a16" leaves the rows that are multiplied as floats. "a8" rounds them to 8 bits too, by a scale for
each row, and for each group of it where the weight has groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.contracts import Part
from minigpt4_runtime.formats.rounding import find_ranges, find_scales, round_rows

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (32, 64, 128)
# So many of the weight's numbers are floats at a time: they stay in a processor's cache.
_NUMBERS_AT_ONCE = 2**20
_ROUNDED_AT_ONCE = 2**18
_PER_WORD = 8  # Numbers of 4 bits in an int32.


@dataclass(frozen=True)
class Grid:
    """The scale (out, groups) of each group, and its zero point where there is one; float32."""

    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class IntegerFormat:
    """See `WeightFormat`. Without a `group_size` a scale is for a whole row."""

    bits: Literal[8, 4]
    rounds_rows: bool
    group_size: int | None = None
    is_symmetric: bool = True

    @property
    def family(self) -> str:
        """The name without groups and zero points."""
        return f"w{self.bits}a{8 if self.rounds_rows else 16}"

    @property
    def name(self) -> str:
        """As in "w8a8", "w4a16-g64", "w4a16-g32-asymmetric"."""
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"{self.family}{group}{'' if self.is_symmetric else '-asymmetric'}"

    @property
    def numbers_per_item(self) -> Mapping[str, int]:
        """A word has 8 numbers; scales and zero points have none."""
        return {
            **({"weight_packed": _PER_WORD} if self.bits == 4 else {}),
            "weight_scale": 0,
            **({} if self.is_symmetric else {"weight_zero_point": 0}),
        }

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        if self.bits == 4:
            return -8, 7
        return (-127 if self.is_symmetric else -128), 127

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The integers, the scales, and zero points where the format has them."""
        self._refuse_sizes(out_features, in_features)
        is_cut = None if self.group_size is None else 1
        groups = 1 if self.group_size is None else in_features // self.group_size
        # A row's scale is one of thousands of numbers; a group's takes room.
        dtype: Literal["float16", "float32"] = "float32" if self.group_size is None else "float16"
        scale = Part((out_features, groups), dtype, split=(0, is_cut))
        if self.bits == 8:
            parts = {"weight": Part((out_features, in_features), "int8"), "weight_scale": scale}
            zero = Part((out_features, groups), "int8", split=(0, is_cut))
        else:
            packed = Part((out_features, in_features // _PER_WORD), "int32")
            parts = {"weight_packed": packed, "weight_scale": scale}
            zero = Part((out_features // _PER_WORD, groups), "int32", split=(0, is_cut))
        return parts if self.is_symmetric else {**parts, "weight_zero_point": zero}

    def _refuse_sizes(self, out_features: int, in_features: int) -> None:
        if self.group_size and in_features % self.group_size:
            fitting = [size for size in GROUP_SIZES if in_features % size == 0]
            remedy = f"take groups of {fitting[-1]}" if fitting else "take a format without groups"
            raise ConfigError(
                f"{self.name} cannot hold a weight of {in_features} inputs, as {self.group_size} "
                f"does not divide them (of ranks, each rank's part counts): {remedy}."
            )
        if self.bits == 4 and not self.is_symmetric and out_features % _PER_WORD:
            raise ConfigError(
                f"{self.name} cannot hold a weight of {out_features} outputs, as {_PER_WORD} does "
                "not divide them (of ranks, each rank's part counts): take a symmetric format."
            )

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts, by the clipping range with the least error for each row or group."""
        return self.store(*self.round(weight))

    def round(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Grid]:
        """The integers (out, in) nearest to a weight, and their grid. See `find_grid`."""
        import torch

        rows_at_once = max(1, _ROUNDED_AT_ONCE // weight.shape[1])
        done = []
        for rows in torch.split(weight, rows_at_once):
            grid = self.find_grid(rows.float(), importance)
            done.append((self.to_integers(rows.float(), grid), grid))
        zeros = [grid.zero_point for _, grid in done if grid.zero_point is not None]
        grid = Grid(
            torch.cat([grid.scale for _, grid in done]), torch.cat(zeros) if zeros else None
        )
        return torch.cat([integers for integers, _ in done]), grid

    def find_grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The best grid for floats (out, in), as it is stored.

        `importance` (in,) says how much an error in each input counts.
        """
        import torch

        groups = weight.reshape(len(weight), -1, self.group_size or weight.shape[1])
        if importance is not None:
            importance = importance.view(groups.shape[1:])
        kept = torch.float32 if self.group_size is None else torch.float16
        if self.is_symmetric:
            return Grid(find_scales(groups, *self.limits, importance).to(kept).float(), None)
        scale, zero_point = find_ranges(groups, *self.limits, importance)
        return Grid(scale.to(kept).float(), zero_point)

    def to_integers(self, weight: Tensor, grid: Grid) -> Tensor:
        """Floats (out, in) → the nearest integers of a grid, int8."""
        import torch

        groups = weight.reshape(*grid.scale.shape, -1) / grid.scale[..., None]
        if grid.zero_point is not None:
            groups += grid.zero_point[..., None]
        return groups.round_().clamp_(*self.limits).to(torch.int8).view(weight.shape)

    def to_floats(self, integers: Tensor, grid: Grid) -> Tensor:
        """The other way: integers (out, in) of a grid → float32."""
        groups = integers.float().view(*grid.scale.shape, -1)
        if grid.zero_point is not None:
            groups = groups - grid.zero_point[..., None]
        return (groups * grid.scale[..., None]).flatten(1)

    def store(self, integers: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The parts of integers (out, in) and their grid."""
        import torch

        kept = torch.float32 if self.group_size is None else torch.float16
        name = "weight" if self.bits == 8 else "weight_packed"
        stored = integers if self.bits == 8 else pack_words(integers)
        parts = {name: stored, "weight_scale": grid.scale.to(kept)}
        if grid.zero_point is not None:
            zero = grid.zero_point.to(torch.int8)
            zero = zero if self.bits == 8 else pack_words(zero.T).T.contiguous()
            parts["weight_zero_point"] = zero
        return parts

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix in float32."""
        (matrix,) = self._floats(parts, at_once=None)
        return matrix

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out), summed in float32."""
        import torch
        from torch.nn import functional

        wide = rows.float()
        if self.rounds_rows:
            wide = round_rows(wide, self.group_size or rows.shape[-1])
        product = torch.cat(
            [functional.linear(wide, some) for some in self._floats(parts, _NUMBERS_AT_ONCE)], -1
        )
        return (product if bias is None else product + bias.float()).to(rows.dtype)

    def _floats(self, parts: Mapping[str, Tensor], at_once: int | None) -> Iterator[Tensor]:
        """The matrix in float32, some rows with `at_once` numbers at a time; None: all of them."""
        stored = parts["weight" if self.bits == 8 else "weight_packed"]
        scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
        if zeros is not None and self.bits == 4:
            zeros = unpack_words(zeros.T).T
        in_features = stored.shape[1] * (1 if self.bits == 8 else _PER_WORD)
        step = max(1, at_once // in_features) if at_once else len(stored)
        for first in range(0, len(stored), step):
            some = slice(first, first + step)
            integers = stored[some] if self.bits == 8 else unpack_words(stored[some])
            zero_point = None if zeros is None else zeros[some].float()
            yield self.to_floats(integers, Grid(scales[some].float(), zero_point))


def pack_words(integers: Tensor) -> Tensor:
    """Integers from -8 to 7, int8 (N, K) → int32 (N, K / 8).

    Number 8j + i of a row is bits 4i to 4i + 3 of its word j, as a number from 0 to 15.
    """
    import torch

    nibbles = (integers + 8).to(torch.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return packed.flatten().view(torch.int32).view(len(integers), -1)


def unpack_words(words: Tensor) -> Tensor:
    """The other way: int32 (N, K / 8) → int8 (N, K)."""
    import torch

    packed = words.flatten().view(torch.uint8).view(len(words), -1)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8) - 8


_SIZES: tuple[tuple[Literal[8, 4], tuple[int | None, ...]], ...] = (
    (8, (None, *GROUP_SIZES)),
    (4, GROUP_SIZES),
)
INTEGER_FORMATS = {
    each.name: each
    for bits, group_sizes in _SIZES
    for group_size in group_sizes
    for rounds_rows in (False, True)
    for is_symmetric in (True, False)
    for each in [IntegerFormat(bits, rounds_rows, group_size, is_symmetric)]
}
