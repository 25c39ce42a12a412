"""The contract of a weight format, and the parts that stand for one weight.

Owns   the protocols, and the division of a part over ranks, as data.
Takes  nothing: there is no code here that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from minigpt4_runtime.config import DTypeName

if TYPE_CHECKING:
    from torch import Tensor

# What torch and a safetensors file both call a type of number.
StoredDTypeName = DTypeName | Literal["float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


@dataclass(frozen=True)
class Part:
    """One tensor of a weight. Without a `dtype` it has that of the model's floats.

    `split` says along which of its own dimensions it is divided where the weight is divided along
    its outputs, and where along its inputs; None: each rank has all of it.
    """

    shape: tuple[int, ...]
    dtype: StoredDTypeName | None = None
    split: tuple[int | None, int | None] = (0, 1)


class LinearKernel(Protocol):
    """The product with one weight."""

    def __call__(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out), in the dtype of `rows`: `rows @ weight.T + bias`."""


@dataclass(frozen=True)
class InOrder:
    """A kernel that wants a weight's parts in an order of its own, once they are loaded.

    `arrange` gives the parts in that order, and the product with them.
    """

    arrange: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], LinearKernel]]


class WeightFormat(Protocol):
    """The way in which one weight (out, in) is held."""

    @property
    def name(self) -> str:
        """Its name in the manifest of a model folder, and in the table of formats."""

    @property
    def family(self) -> str:
        """Its name in the table of kernels, which formats share that differ in sizes alone."""

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The parts of a weight, by name. No part may be called "bias".

        Raises:
            ConfigError: the format cannot hold a weight of these sizes.
        """

    @property
    def numbers_per_item(self) -> Mapping[str, int]:
        """How many of the weight's numbers an item of a part stands for, where it is not one."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight of floats, in the order of `parts`, on its device.

        Parts without a dtype of their own keep the weight's.
        """

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix of floats that the parts stand for."""

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """See `LinearKernel`. In plain torch, for any device: it **defines** correct."""
