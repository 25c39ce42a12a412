"""Whether sizes are those of the published model that was asked for by name.

Owns   which sizes tell the published models apart, and the sentence about another model.
Takes  a preset's name and a configuration; gives what differs.
Never  looks at a file.
"""

from collections.abc import Mapping
from typing import Any

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.presets import PRESETS

# Vicuna 7B and Llama 2 7B are equally wide and deep: only the last two tell them apart.
_LANGUAGE_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)


def has_language_sizes(values: Mapping[str, Any], preset: str) -> bool:
    """Whether a Llama's config.json, as far as it speaks, has the sizes of a preset."""
    wanted = PRESETS[preset].language
    return all(values.get(name) in (None, getattr(wanted, name)) for name in _LANGUAGE_SIZES)


def check_language_sizes(where: object, values: Mapping[str, Any], preset: str) -> None:
    """Refuse a Llama's config.json of other sizes than those of a preset, as far as it speaks.

    Raises:
        CheckpointError: it is another model's; the message has what differs of both.
    """
    wanted = {name: getattr(PRESETS[preset].language, name) for name in _LANGUAGE_SIZES}
    found = {name: values.get(name, size) for name, size in wanted.items()}
    _refuse_differing(where, found, wanted, preset)


def check_preset(where: object, config: ModelConfig, preset: str) -> None:
    """Refuse a model of other sizes than those of a preset.

    Raises:
        CheckpointError: it is another model; the message has what differs of both.
    """
    _refuse_differing(where, _list_sizes(config), _list_sizes(PRESETS[preset]), preset)


def _refuse_differing(
    where: object, found: Mapping[str, object], wanted: Mapping[str, object], preset: str
) -> None:
    differing = [name for name, value in wanted.items() if found[name] != value]
    if differing:
        raise CheckpointError(
            f"{where} is of another model than {preset}: {_show(found, differing)}, and {preset} "
            f"has {_show(wanted, differing)}."
        )


def _list_sizes(config: ModelConfig) -> dict[str, object]:
    language = {name: getattr(config.language, name) for name in _LANGUAGE_SIZES}
    return {
        **language,
        "template": config.template,
        "vision hidden_size": config.vision.hidden_size,
        "vision num_hidden_layers": config.vision.num_hidden_layers,
    }


def _show(sizes: Mapping[str, object], names: list[str]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in names)
