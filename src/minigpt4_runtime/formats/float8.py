"""Weights and rows as floats of 8 bits (e4m3), with a scale for each row of both.

Owns   the format w8a8-fp8, and the plain product. Micikevicius et al., "FP8 Formats for Deep
       Learning", 2022. A number keeps three bits behind its first one whatever its size is, where
       those of 8-bit integers are steps of the row's largest: what lies far outside costs less, and
       all else more.
Takes  a matrix of floats; gives its parts. Numbers are kept as bytes, which every file and device
       can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from minigpt4_runtime.formats.contracts import Part

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
# A row of zeros has no other scale.
_SMALLEST_SCALE = 1e-30
# So many of the weight's numbers are floats at a time.
_NUMBERS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Float8Format:
    """See `WeightFormat`."""

    name = family = "w8a8-fp8"
    bits = 8
    rounds_rows = True
    numbers_per_item: ClassVar[Mapping[str, int]] = {"weight_scale": 0}

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The numbers as bytes, and a scale for each row."""
        return {
            "weight": Part((out_features, in_features), "uint8"),
            "weight_scale": Part((out_features, 1), "float32", split=(0, None)),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts."""
        import torch

        numbers, scale = round_to_float8(weight.float())
        return {"weight": numbers.view(torch.uint8), "weight_scale": scale}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix in float32."""
        import torch

        return parts["weight"].view(torch.float8_e4m3fn).float() * parts["weight_scale"]

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out), summed in float32."""
        import torch
        from torch.nn import functional

        numbers, scale = round_to_float8(rows.float())
        wide, count = numbers.float() * scale, max(1, _NUMBERS_AT_ONCE // rows.shape[-1])
        product = torch.cat(
            [
                functional.linear(
                    wide, self.unpack({n: part[first : first + count] for n, part in parts.items()})
                )
                for first in range(0, len(parts["weight"]), count)
            ],
            -1,
        )
        return (product if bias is None else product + bias.float()).to(rows.dtype)


def round_to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(…, in) float32 → float8_e4m3fn, and the scale of each row, (…, 1) float32."""
    import torch

    scale = rows.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_SCALE) / LARGEST
    # What is a little larger would become NaN.
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


FLOAT8 = Float8Format()
