"""What published files hold, under published names, and the reading of it.

Owns   Place and Inventory, the parts of a whole model in one file, and weights made of others.
Takes  paths; gives names, shapes and dtypes, and a tensor when its Place is read.
Never  keeps more than one file open, but for the moment in which two tensors become one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import Shape, show_shape
from minigpt4_runtime.convert.key_map import PARTS, matches
from minigpt4_runtime.convert.published import open_tensors
from minigpt4_runtime.convert.wrapping import describe_layout, plain_names
from minigpt4_runtime.errors import CheckpointError

# bitsandbytes' 8 bits: row r of a weight is its whole numbers · SCB[r] / 127.
_SCALE, _FORMAT, _LARGEST_INT8 = "SCB", "weight_format", 127
# What such a weight becomes: the dtype that it was rounded from.
_WIDENED = torch.float16


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies, by its stored `name`, and what it will be when it is read.

    A weight that is made of several is read here first; `make` joins it with the `others`.
    """

    path: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    others: tuple["Place", ...] = ()
    make: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes when it is read."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """Reads tensors where they lie. One file stays open until one of another is asked for."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, Tensor] = {}

    def read(self, place: Place) -> Tensor:
        """A tensor, in the mapped file unless it is made of several."""
        if place.path != self._path:
            # The mapping of a file ends with its last tensor: it must go before the next comes.
            self._tensors = {}
            self._tensors = open_tensors(place.path)
            self._path = place.path
        tensor = self._tensors[place.name]
        if place.make is None:
            return tensor
        return place.make([tensor, *(Reader().read(other) for other in place.others)])


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a published file or of a folder of shards. `path` is its name in messages."""

    path: Path
    places: Mapping[str, Place]

    def shape(self, name: str, *, remedy: str) -> Shape:
        """The shape of a tensor that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if name not in self.places:
            told = describe_layout(self.places) or remedy
            raise CheckpointError(f"{self.path} holds no {name}. {told}")
        return self.places[name].shape

    def part(self, role: str) -> "Inventory":
        """Without the other parts of a whole model: what is of this one, and what is of none."""
        return self.without(*(other for other in PARTS if other != role))

    def without(self, *roles: str) -> "Inventory":
        """Without these parts of a whole model."""
        dropped = [pattern for role in roles for pattern in PARTS[role]]
        kept = {name: place for name, place in self.places.items() if not matches(name, dropped)}
        return Inventory(self.path, kept)

    def only(self, patterns: Sequence[str]) -> "Inventory":
        """The tensors whose names fit."""
        kept = {name: place for name, place in self.places.items() if matches(name, patterns)}
        return Inventory(self.path, kept)

    def overlaid(self, other: "Inventory") -> "Inventory":
        """The same, replaced and completed by what another file holds, as upstream loads it."""
        return Inventory(self.path, {**self.places, **other.places})


def take_inventory(path: Path, files: Iterable[Path]) -> Inventory:
    """List what the files hold, opening and closing one after the other.

    Raises:
        CheckpointError: a file cannot be opened, or a tensor stands twice in them.
    """
    places: dict[str, Place] = {}
    for file in files:
        for name, place in _list_places(file):
            if name in places:
                raise CheckpointError(_describe_double(places[name], place))
            places[name] = place
    return Inventory(path, _widen(places))


def _list_places(file: Path) -> list[tuple[str, Place]]:
    tensors = open_tensors(file)
    return [
        (name, Place(file, stored, tuple(tensors[stored].shape), tensors[stored].dtype))
        for stored, name in plain_names(tensors).items()
    ]


def _describe_double(first: Place, second: Place) -> str:
    if first.path == second.path:
        return (
            f"{first.path} holds one weight twice, as {first.name} and as {second.name}. Take the "
            "published file, or save one of them."
        )
    return (
        f"{second.name} stands both in {first.path} and in {second.path}. "
        "Keep only the files of one download in that folder."
    )


def _widen(places: Mapping[str, Place]) -> dict[str, Place]:
    """Put 8-bit weights in one with their scales; nothing of them is left over."""
    widened = dict(places)
    for name in [name for name, place in places.items() if place.dtype == torch.int8]:
        owner = name.removesuffix("weight")
        scale = widened.pop(f"{owner}{_SCALE}", None)
        order = widened.pop(f"{owner}{_FORMAT}", None)
        place = places[name]
        if scale is None:
            continue
        if len(place.shape) != 2 or math.prod(scale.shape) != place.shape[0]:
            raise CheckpointError(
                f"{place.path}: {name} of 8 bits is {show_shape(place.shape)}, and its scales "
                f"{show_shape(scale.shape)}; a scale for each row is known. Take the file again."
            )
        others = (scale,) if order is None else (scale, order)
        make = partial(_dequantise, place)
        widened[name] = Place(place.path, place.name, place.shape, _WIDENED, others, make)
    return widened


def _dequantise(place: Place, tensors: Sequence[Tensor]) -> Tensor:
    weight, scale, *order = tensors
    if order and bool(order[0].any()):
        raise CheckpointError(
            f"{place.path}: {place.name} of 8 bits lies in the order of a graphics card. Load it "
            "where it was made, with a newer bitsandbytes, which saves rows, and save it again."
        )
    widened = weight.float().mul_(scale.float().view(-1, 1)).div_(_LARGEST_INT8)
    return widened.to(_WIDENED)
