"""What a conversion will do, decided from names, shapes and dtypes before anything is written.

Owns   the match of published names against ours, file by file.
Takes  inventories, the ModelConfig and a dtype if one is asked for; gives a ConversionPlan.
Never  reads a weight: the few that are made of others are tried out on the meta device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FLOATS_WANTED
from minigpt4_runtime.checkpoint.weights import Shape, WeightForm, count, list_some, show_shape
from minigpt4_runtime.config import DTypeName, ModelConfig
from minigpt4_runtime.convert import key_map
from minigpt4_runtime.convert.architecture import Published
from minigpt4_runtime.convert.inventory import Inventory, Place
from minigpt4_runtime.convert.key_map import Make, OriginMap
from minigpt4_runtime.convert.wrapping import describe_layout
from minigpt4_runtime.errors import CheckpointError


@dataclass(frozen=True)
class PlannedWeight:
    """One of our weights: which published tensors it is made of, and how."""

    name: str
    places: tuple[Place, ...]
    make: Make

    @property
    def origin(self) -> str:
        """What it is called in messages to a person; a constant comes from no file."""
        if not self.places:
            return self.name
        return f"{self.places[0].path}: {', '.join(place.name for place in self.places)}"


@dataclass(frozen=True)
class ConversionPlan:
    """All weights in their order, which no layout of the files changes, and their `forms`.

    `source_bytes` is what the published tensors take that the weights are made of.
    """

    config: ModelConfig
    weights: tuple[PlannedWeight, ...]
    forms: Mapping[str, WeightForm]
    source_bytes: int


@dataclass(frozen=True)
class _Part:
    """One published part of the model, where its weights come from, and what it may hold more."""

    inventory: Inventory
    origins: OriginMap
    unused: Sequence[str]


def make_plan(
    published: Published, config: ModelConfig, dtype: DTypeName | None = None
) -> ConversionPlan:
    """Match the published names against ours; without `dtype` every weight keeps its own.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape, or no float.
    """
    expected = model_shapes(config)
    weights = []
    for part in _list_parts(published, config):
        _check_names(part)
        for name, origin in part.origins.items():
            places = tuple(part.inventory.places[source_name] for source_name in origin.names)
            weights.append(PlannedWeight(name, places, origin.make))
    assert sorted(weight.name for weight in weights) == sorted(expected), (
        "the key map and the model disagree"
    )
    forms = {}
    for weight in weights:
        own_dtype = _check_weight(weight, expected[weight.name])
        forms[weight.name] = WeightForm(expected[weight.name], dtype or own_dtype)
    source_bytes = sum(place.num_bytes for weight in weights for place in weight.places)
    return ConversionPlan(config, tuple(weights), forms, source_bytes)


def _list_parts(published: Published, config: ModelConfig) -> list[_Part]:
    folder, projection = published.language_folder, published.projection
    language = _Part(
        published.language,
        key_map.language_origins(config.language, is_tied=folder.is_tied),
        (*key_map.UNUSED_LANGUAGE, *((r"lm_head\.weight",) if folder.is_tied else ())),
    )
    # Where the file has one block more than is used.
    dropped_block = rf"blocks\.{config.vision.num_hidden_layers}\..*"
    vision = _Part(
        published.vision,
        key_map.vision_origins(config.vision),
        (*key_map.UNUSED_VISION, dropped_block),
    )
    own = _Part(
        projection,
        key_map.projection_origins(),
        (*key_map.UNUSED_PROJECTION, *key_map.LN_VISION),
    )
    if config.qformer is None:
        return [language, vision, _ln_vision_alone(projection, config), own]
    assert published.qformer is not None
    qformer = _Part(
        published.qformer,
        key_map.ln_vision_origins() | key_map.qformer_origins(config.qformer),
        key_map.UNUSED_QFORMER,
    )
    return [language, vision, qformer, own]


def _ln_vision_alone(projection: Inventory, config: ModelConfig) -> _Part:
    """Upstream's Llama-2 variant leaves ln_vision as torch makes it, unless a file has it."""
    trained = projection.only(key_map.LN_VISION)
    origins = (
        key_map.ln_vision_origins()
        if trained.places
        else key_map.untrained_ln_vision(config.vision.hidden_size)
    )
    return _Part(trained, origins, ())


def _check_names(part: _Part) -> None:
    inventory = part.inventory
    needed = [name for origin in part.origins.values() for name in origin.names]
    missing = [name for name in needed if name not in inventory.places]
    layout = describe_layout(place.name for place in inventory.places.values())
    if missing:
        remedy = layout or (
            "Download the file again, or take the one that was published for this model."
        )
        raise CheckpointError(
            f"{inventory.path}: {count(missing, 'tensor')} missing ({list_some(missing)}). {remedy}"
        )
    known = set(needed)
    extra = [
        place.name
        for name, place in inventory.places.items()
        if name not in known and not key_map.matches(name, part.unused)
    ]
    if extra:
        remedy = layout or (
            "The model has no place for them: take the published file; fine-tuned weights must be "
            "merged into the file that they belong to."
        )
        raise CheckpointError(
            f"{inventory.path}: {count(extra, 'tensor')} too many ({list_some(extra)}). {remedy}"
        )


def _check_weight(weight: PlannedWeight, expected: Shape) -> DTypeName:
    """Make sure that a weight can be made, and give the dtype that making it loses nothing in."""
    for place in weight.places:
        if place.dtype not in DTYPE_NAME_OF:
            raise CheckpointError(
                f"{place.path}: {place.name} is of dtype "
                f"{str(place.dtype).removeprefix('torch.')}. {FLOATS_WANTED}"
            )
    made = _try_out(weight)
    if made is None or made.shape != expected:
        shapes = ", ".join(f"{place.name} {show_shape(place.shape)}" for place in weight.places)
        raise CheckpointError(
            f"{weight.places[0].path}: shapes do not fit the rest of the model: {shapes}, but "
            f"{show_shape(expected)} is needed. Give files that were published together."
        )
    return DTYPE_NAME_OF[made.dtype]


def _try_out(weight: PlannedWeight) -> Tensor | None:
    """A stand-in for what a weight will be, or None where it cannot be made at all."""
    stand_ins = [
        torch.empty(place.shape, dtype=place.dtype, device="meta") for place in weight.places
    ]
    try:
        return weight.make(stand_ins)
    except (RuntimeError, IndexError, ValueError):
        return None
