"""The recipe of every weight in the model folder, matched by name and shape.

Owns   the match between published names and ours, part by part, with nothing missing or left over.
Takes  the inventories and the ModelConfig; gives a recipe for each of our weights.
Never  reads a weight: a recipe of several tensors is tried on the meta device.
"""

from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FLOATS_WANTED
from minigpt4_runtime.checkpoint.weights import TensorShape, count, list_some, show_shape
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.convert.architecture import Published
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.key_map import Origin, OriginMap, PartMap, matches
from minigpt4_runtime.convert.recipe import Recipe
from minigpt4_runtime.convert.wrapping import describe_layout
from minigpt4_runtime.errors import CheckpointError


def match_weights(published: Published, config: ModelConfig) -> dict[str, Recipe]:
    """Find the recipe of each of our weights. Their order does not depend on the files.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape, or no float.
    """
    expected = model_shapes(config)
    recipes = {}
    for role, part in published.layout.parts.items():
        inventory = published.parts[role]
        for name, origin in _match_names(inventory, part(config)).items():
            recipes[name] = _join(inventory, origin, expected[name])
    assert recipes.keys() == expected.keys(), "the key map and the model disagree"
    return recipes


def _match_names(inventory: Inventory, part: PartMap) -> OriginMap:
    """The origins of the part's weights, after a check that the names in the files fit them."""
    origins, present = part.origins, inventory.recipes.keys()
    if not any(name in present for ours in part.untrained for name in origins[ours].names):
        origins = origins | part.untrained
    needed = {name: None for origin in origins.values() for name in origin.names}
    if missing := [name for name in needed if name not in present]:
        remedy = "Download the file again, or take the one that was published for this model."
        raise CheckpointError(_describe(inventory, "missing", missing, remedy))
    extra = [
        each.tensors[0].name
        for name, each in inventory.recipes.items()
        if name not in needed and not matches(name, part.unused)
    ]
    if extra:
        remedy = (
            "The model has no place for them: take the published file; fine-tuned weights must be "
            "merged into the file that they belong to."
        )
        raise CheckpointError(_describe(inventory, "too many", extra, remedy))
    return origins


def _describe(inventory: Inventory, what: str, names: list[str], remedy: str) -> str:
    layout = describe_layout(each.tensors[0].name for each in inventory.recipes.values())
    return f"{inventory.path}: {count(names, 'tensor')} {what} ({list_some(names)}). " + (
        layout or remedy
    )


def _join(inventory: Inventory, origin: Origin, expected: TensorShape) -> Recipe:
    """The recipe of one weight; merged weights have the widest dtype of their tensors."""
    parts = [inventory.recipes[name] for name in origin.names]
    for part in parts:
        if part.dtype not in DTYPE_NAME_OF:
            raise CheckpointError(
                f"{part.origin} is of dtype {str(part.dtype).removeprefix('torch.')}. "
                f"{FLOATS_WANTED}"
            )
    try:
        made = Recipe.joined(parts, origin.make)
    except (RuntimeError, IndexError, ValueError):
        made = None
    if made is None or made.shape != expected:
        shapes = ", ".join(f"{part.tensors[0].name} {show_shape(part.shape)}" for part in parts)
        raise CheckpointError(
            f"{parts[0].tensors[0].path}: shapes do not fit the rest of the model: {shapes}, but "
            f"{show_shape(expected)} is needed. Give files that were published together."
        )
    return made
