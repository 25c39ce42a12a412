"""The weights that published files hold, under their published names.

Owns   Inventory, the parts of a whole model in one file, and 8-bit weights with their scales.
Takes  paths; gives a recipe for each weight in the files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import TensorShape, show_shape
from minigpt4_runtime.convert.key_map import PARTS, matches
from minigpt4_runtime.convert.recipe import Recipe, list_tensors
from minigpt4_runtime.convert.wrapping import describe_layout, plain_names
from minigpt4_runtime.errors import CheckpointError

# bitsandbytes' 8 bits: row r of a weight is its whole numbers · SCB[r] / 127.
_SCALE, _FORMAT, _LARGEST_INT8 = "SCB", "weight_format", 127
# Such a weight becomes the dtype that it was rounded from.
_WIDENED = torch.float16


@dataclass(frozen=True)
class Inventory:
    """Every weight of a published file or of a folder of shards. Messages call it `path`."""

    path: Path
    recipes: Mapping[str, Recipe]

    def shape(self, name: str, *, remedy: str) -> TensorShape:
        """The shape of a weight that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if name not in self.recipes:
            told = describe_layout(self.recipes) or remedy
            raise CheckpointError(f"{self.path} holds no {name}. {told}")
        return self.recipes[name].shape

    def part(self, role: str) -> "Inventory":
        """Without the other parts of a whole model. Names of no part stay."""
        return self.without(*(other for other in PARTS if other != role))

    def without(self, *roles: str) -> "Inventory":
        """Without these parts of a whole model."""
        dropped = self.only([pattern for role in roles for pattern in PARTS[role]]).recipes
        kept = {name: each for name, each in self.recipes.items() if name not in dropped}
        return Inventory(self.path, kept)

    def only(self, patterns: Sequence[str]) -> "Inventory":
        """The weights whose names fit."""
        kept = {name: each for name, each in self.recipes.items() if matches(name, patterns)}
        return Inventory(self.path, kept)

    def overlaid(self, recipes: Mapping[str, Recipe]) -> "Inventory":
        """The same, replaced and completed by other weights, as upstream loads a fine-tune."""
        return Inventory(self.path, {**self.recipes, **recipes})


def take_inventory(path: Path, files: Iterable[Path]) -> Inventory:
    """List the weights of the files, opening and closing one after the other.

    Raises:
        CheckpointError: a file cannot be opened, or a tensor stands twice in them.
    """
    recipes: dict[str, Recipe] = {}
    for file in files:
        stored = {each.tensors[0].name: each for each in list_tensors(file)}
        for stored_name, name in plain_names(stored).items():
            if name in recipes:
                raise CheckpointError(_describe_double(recipes[name], stored[stored_name]))
            recipes[name] = stored[stored_name]
    return Inventory(path, _widen(recipes))


def _describe_double(*recipes: Recipe) -> str:
    first, second = (recipe.tensors[0] for recipe in recipes)
    if first.path == second.path:
        return (
            f"{first.path} holds one weight twice, as {first.name} and as {second.name}. Take the "
            "published file, or save one of them."
        )
    return (
        f"{second.name} stands both in {first.path} and in {second.path}. "
        "Keep only the files of one download in that folder."
    )


def _widen(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Merge each 8-bit weight with its scales, which are then not listed."""
    widened = dict(recipes)
    for name in [name for name, each in recipes.items() if each.dtype == torch.int8]:
        owner = name.removesuffix("weight")
        scale = widened.pop(f"{owner}{_SCALE}", None)
        order = widened.pop(f"{owner}{_FORMAT}", None)
        weight = recipes[name]
        if scale is None:
            continue
        if len(weight.shape) != 2 or math.prod(scale.shape) != weight.shape[0]:
            raise CheckpointError(
                f"{weight.tensors[0].path}: {name} of 8 bits is {show_shape(weight.shape)}, and "
                f"its scales {show_shape(scale.shape)}; a scale for each row is known. Take the "
                "file again."
            )
        parts = [weight, scale] if order is None else [weight, scale, order]
        widened[name] = Recipe.joined(parts, partial(_dequantise, weight.origin))
    return widened


def _dequantise(origin: str, tensors: Sequence[Tensor]) -> Tensor:
    weight, scale, *order = tensors
    if order and not order[0].is_meta and bool(order[0].any()):
        raise CheckpointError(
            f"{origin} of 8 bits lies in the order of a graphics card. Load it where it was made, "
            "with a newer bitsandbytes, which saves rows, and save it again."
        )
    widened = weight.float().mul_(scale.float().view(-1, 1)).div_(_LARGEST_INT8)
    return widened.to(_WIDENED)
