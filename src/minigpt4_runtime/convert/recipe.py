"""The recipe of a weight: one published tensor, or several that are merged when they are read.

Owns   PublishedTensor, Recipe and Reader.
Takes  paths; gives tensors. A tensor that needs no merging stays in its mapped file.
Never  holds more than one merged weight, nor more than one open file outside a merge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import TensorShape
from minigpt4_runtime.convert.published import open_tensors

Make = Callable[[Sequence[Tensor]], Tensor]


def as_it_is(tensors: Sequence[Tensor]) -> Tensor:
    """The only tensor, unchanged."""
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class PublishedTensor:
    """Where a published tensor lies. `name` is its name in that file."""

    path: Path
    name: str
    num_bytes: int


@dataclass(frozen=True)
class Recipe:
    """The published tensors of one weight, how they become it, and its shape and dtype then."""

    tensors: tuple[PublishedTensor, ...]
    shape: TensorShape
    dtype: torch.dtype
    make: Make = as_it_is

    @classmethod
    def joined(cls, parts: Sequence["Recipe"], make: Make) -> "Recipe":
        """The recipe of `make` on these parts, after a trial on the meta device.

        Raises:
            RuntimeError: it cannot be made of such shapes; IndexError and ValueError say the same.
        """

        def make_all(tensors: Sequence[Tensor]) -> Tensor:
            rest = iter(tensors)
            return make([part.make([*islice(rest, len(part.tensors))]) for part in parts])

        made = make([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        return cls(tensors, tuple(made.shape), made.dtype, make_all)

    @property
    def origin(self) -> str:
        """Its name in messages: a file and names, or an empty text for a constant."""
        names = ", ".join(dict.fromkeys(tensor.name for tensor in self.tensors))
        return f"{self.tensors[0].path}: {names}" if self.tensors else ""

    @property
    def source_bytes(self) -> int:
        """The number of bytes that are read to make it."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def list_tensors(path: Path) -> list[Recipe]:
    """Open a file, and give each of its tensors as the recipe of itself.

    Raises:
        CheckpointError: it is no weight file, or damaged.
    """
    return [
        Recipe((PublishedTensor(path, name, tensor.nbytes),), tuple(tensor.shape), tensor.dtype)
        for name, tensor in open_tensors(path).items()
    ]


class Reader:
    """Reads weights one after the other. The file of a weight's first tensor stays open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, Tensor] = {}

    def read(self, recipe: Recipe) -> Tensor:
        """Make one weight. Tensors of other files are opened for it alone."""
        own = recipe.tensors[0].path if recipe.tensors else None
        other = Reader()
        return recipe.make(
            [(self if each.path == own else other).map(each) for each in recipe.tensors]
        )

    def map(self, tensor: PublishedTensor) -> Tensor:
        """One tensor, in its mapped file."""
        if tensor.path != self._path:
            # The mapping of a file ends with its last tensor: it must go before the next comes.
            self._tensors = {}
            self._tensors = open_tensors(tensor.path)
            self._path = tensor.path
        return self._tensors[tensor.name]
