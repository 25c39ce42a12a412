"""Weights of which two of every four neighbours along the inputs are kept, as integers of 8 bits.

Owns   the formats w8a16-sparse24 and w8a8-sparse24: the choice of what is kept, its packing, and
       the plain product. A weight takes 5 bits: half of 8, and 1 for the places.
Takes  a matrix of floats, and how much each input counts where that is known; gives its parts.

What is kept has the largest magnitude. `quantise/gptq.py` chooses by inputs, and leaves zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.contracts import Part
from minigpt4_runtime.formats.rounding import find_scales, round_rows

if TYPE_CHECKING:
    from torch import Tensor

# A byte has the positions of four kept numbers, of eight.
_PER_BYTE = 8
_LIMIT = 127


@dataclass(frozen=True)
class SparseFormat:
    """See `WeightFormat`. A scale is for a whole row."""

    rounds_rows: bool
    bits = 8

    @property
    def name(self) -> str:
        """As in "w8a8-sparse24"."""
        return f"w8a{8 if self.rounds_rows else 16}-sparse24"

    family = name

    @property
    def numbers_per_item(self) -> Mapping[str, int]:
        """A kept number stands for itself and for one that is not kept."""
        return {"weight_values": 2, "weight_positions": 0, "weight_scale": 0}

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The kept integers, their places, and a scale for each row."""
        if in_features % _PER_BYTE:
            raise ConfigError(
                f"{self.name} cannot hold a weight of {in_features} inputs, as {_PER_BYTE} does "
                "not divide them (of ranks, each rank's part counts): take another format."
            )
        return {
            "weight_values": Part((out_features, in_features // 2), "int8"),
            "weight_positions": Part((out_features, in_features // _PER_BYTE), "uint8"),
            "weight_scale": Part((out_features, 1), "float32", split=(0, None)),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts."""
        return self.pack_by_inputs(weight, None)

    def pack_by_inputs(self, weight: Tensor, squares: Tensor | None) -> dict[str, Tensor]:
        """The parts; scales by `squares` (in,), the sums of the squares of each input."""
        import torch

        fours = weight.float().reshape(len(weight), -1, 4)
        places = fours.abs().topk(2, dim=-1).indices.sort(dim=-1).values
        kept = fours.gather(-1, places).flatten(1)
        importance = None
        if squares is not None:
            each = squares.view(1, -1, 4).expand(len(weight), -1, -1)
            importance = each.gather(-1, places).flatten(1)
        scale = find_scales(kept, -_LIMIT, _LIMIT, importance)[:, None]
        integers = (kept / scale).round_().clamp_(-_LIMIT, _LIMIT).to(torch.int8)
        nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
        positions = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        return {"weight_values": integers, "weight_positions": positions, "weight_scale": scale}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix in float32, zeros in it."""
        import torch

        values, positions = parts["weight_values"], parts["weight_positions"]
        bits = torch.arange(0, 8, 2, device=positions.device)
        places = (positions[..., None].long() >> bits & 3).view(len(values), -1, 2)
        kept = (values.float() * parts["weight_scale"]).view(len(values), -1, 2)
        fours = torch.zeros(*kept.shape[:2], 4, device=kept.device)
        return fours.scatter(-1, places, kept).flatten(1)

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out), summed in float32."""
        from torch.nn import functional

        wide = rows.float()
        if self.rounds_rows:
            wide = round_rows(wide, rows.shape[-1])
        product = functional.linear(
            wide, self.unpack(parts), None if bias is None else bias.float()
        )
        return product.to(rows.dtype)


SPARSE_FORMATS = {each.name: each for each in (SparseFormat(False), SparseFormat(True))}
