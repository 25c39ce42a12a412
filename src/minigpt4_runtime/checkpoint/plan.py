"""What a conversion will do, decided from names, shapes and dtypes before anything is written.

Owns   the match of published names against ours, file by file.
Takes  inventories, the ModelConfig and a dtype if one is asked for; gives a ConversionPlan.
Never  reads a weight: the few that are made of others are tried out on the meta device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint import key_map
from minigpt4_runtime.checkpoint.architecture import Published, with_overrides
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.key_map import Make, OriginMap
from minigpt4_runtime.checkpoint.source import DTYPE_NAME_OF, FLOATS_WANTED, Inventory, Place
from minigpt4_runtime.checkpoint.weights import Shape, WeightForm, count, list_some, show_shape
from minigpt4_runtime.config import DTypeName, ModelConfig
from minigpt4_runtime.errors import CheckpointError


@dataclass(frozen=True)
class PlannedWeight:
    """One of our weights: which published tensors of one file it is made of, and how."""

    name: str
    source_names: tuple[str, ...]
    make: Make


@dataclass(frozen=True)
class PlannedFile:
    """The weights that come from one file, or from none (`path` None: constants)."""

    path: Path | None
    weights: tuple[PlannedWeight, ...]


@dataclass(frozen=True)
class ConversionPlan:
    """All files in the order of reading. `forms` has our names in the order of writing.

    `source_bytes` is what the published tensors take that the weights are made of.
    """

    config: ModelConfig
    files: tuple[PlannedFile, ...]
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
    by_file: dict[Path | None, list[PlannedWeight]] = {}
    forms: dict[str, WeightForm] = {}
    source_bytes = 0
    for part in _list_parts(published, config):
        _check_names(part)
        for name, origin in part.origins.items():
            weight = PlannedWeight(name, origin.names, origin.make)
            own_dtype = _check_weight(part.inventory, weight, expected[name])
            forms[name] = WeightForm(expected[name], dtype or own_dtype)
            places = [part.inventory.places[source_name] for source_name in origin.names]
            source_bytes += sum(place.num_bytes for place in places)
            by_file.setdefault(places[0].path if places else None, []).append(weight)
    files = tuple(PlannedFile(path, tuple(weights)) for path, weights in by_file.items())
    names = [weight.name for file in files for weight in file.weights]
    assert sorted(names) == sorted(expected), "the key map and the model disagree"
    return ConversionPlan(config, files, {name: forms[name] for name in names}, source_bytes)


def _list_parts(published: Published, config: ModelConfig) -> list[_Part]:
    folder, projection = published.language_folder, published.projection
    language = _Part(
        published.language,
        key_map.language_origins(config.language, is_tied=folder.is_tied),
        (*key_map.UNUSED_LANGUAGE, *((r"lm_head\.weight",) if folder.is_tied else ())),
    )
    dropped_block = rf"blocks\.{config.vision.num_hidden_layers}\..*"
    vision = _Part(
        published.vision,
        key_map.vision_origins(config.vision),
        (*key_map.UNUSED_VISION, dropped_block),
    )
    overrides = key_map.OVERRIDES if config.qformer else key_map.OVERRIDES[:1]
    own = _Part(projection, key_map.projection_origins(), (*key_map.UNUSED_PROJECTION, *overrides))
    if config.qformer is None:
        return [language, vision, _ln_vision_alone(projection, config), own]
    assert published.qformer is not None
    qformer = _Part(
        with_overrides(published.qformer, projection),
        key_map.ln_vision_origins() | key_map.qformer_origins(config.qformer),
        key_map.UNUSED_QFORMER,
    )
    return [language, vision, qformer, own]


def _ln_vision_alone(projection: Inventory, config: ModelConfig) -> _Part:
    """Upstream's Llama-2 variant leaves ln_vision as torch makes it, unless a file has it."""
    trained = {
        name: place
        for name, place in projection.places.items()
        if key_map.matches(name, key_map.OVERRIDES[:1])
    }
    origins = (
        key_map.ln_vision_origins()
        if trained
        else key_map.untrained_ln_vision(config.vision.hidden_size)
    )
    return _Part(Inventory(projection.path, trained), origins, ())


def _check_names(part: _Part) -> None:
    needed = [name for origin in part.origins.values() for name in origin.names]
    missing = [name for name in needed if name not in part.inventory.places]
    if missing:
        raise CheckpointError(
            f"{part.inventory.path}: {count(missing, 'tensor')} missing ({list_some(missing)}). "
            "Download the file again, or take the one that was published for this model."
        )
    known = set(needed)
    extra = [
        name
        for name in part.inventory.places
        if name not in known and not key_map.matches(name, part.unused)
    ]
    if extra:
        raise CheckpointError(
            f"{part.inventory.path}: {count(extra, 'tensor')} too many ({list_some(extra)}): "
            "the model has no place for them. Take the published file; fine-tuned weights must be "
            "merged into the file that they belong to."
        )


def _check_weight(inventory: Inventory, weight: PlannedWeight, expected: Shape) -> DTypeName:
    """Make sure that a weight can be made, and give the dtype that making it loses nothing in."""
    places = [inventory.places[name] for name in weight.source_names]
    for name, place in zip(weight.source_names, places, strict=True):
        if place.dtype not in DTYPE_NAME_OF:
            raise CheckpointError(
                f"{place.path}: {name} is of dtype {str(place.dtype).removeprefix('torch.')}. "
                f"{FLOATS_WANTED}"
            )
    made = _try_out(places, weight)
    if made is None or made.shape != expected:
        shapes = ", ".join(
            f"{name} {show_shape(place.shape)}"
            for name, place in zip(weight.source_names, places, strict=True)
        )
        raise CheckpointError(
            f"{inventory.path}: shapes do not fit the rest of the model: {shapes}, but "
            f"{show_shape(expected)} is needed. Give files that were published together."
        )
    return DTYPE_NAME_OF[made.dtype]


def _try_out(places: Sequence[Place], weight: PlannedWeight) -> Tensor | None:
    """A stand-in for what a weight will be, or None where it cannot be made at all."""
    stand_ins = [torch.empty(place.shape, dtype=place.dtype, device="meta") for place in places]
    try:
        return weight.make(stand_ins)
    except (RuntimeError, IndexError, ValueError):
        return None
