"""The check that a model has the sizes of the published one that a user named.

Owns   the sizes that tell the published models apart, and the sentence about another model.
Takes  a preset's name and a configuration; refuses a configuration that differs.
"""

from collections.abc import Mapping
from typing import Any

from minigpt4_runtime.config import LanguageConfig, ModelConfig
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
    """Whether the sizes that a Llama's config.json gives are those of a preset."""
    return not _list_differing(values, _list_language_sizes(PRESETS[preset].language))


def check_language_sizes(where: object, values: Mapping[str, Any], preset: str) -> None:
    """Refuse a Llama's config.json that gives other sizes than those of a preset.

    Raises:
        CheckpointError: it is another model's; the message has the differing sizes of both.
    """
    _refuse_differing(where, values, _list_language_sizes(PRESETS[preset].language), preset)


def check_preset(where: object, config: ModelConfig, preset: str) -> None:
    """Refuse a model of other sizes than those of a preset.

    Raises:
        CheckpointError: it is another model; the message has the differing sizes of both.
    """
    _refuse_differing(where, _list_sizes(config), _list_sizes(PRESETS[preset]), preset)


def _refuse_differing(
    where: object, found: Mapping[str, object], wanted: Mapping[str, object], preset: str
) -> None:
    if differing := _list_differing(found, wanted):
        seen, known = (
            ", ".join(f"{name} {sizes[name]}" for name in differing) for sizes in (found, wanted)
        )
        raise CheckpointError(
            f"{where} is of another model than {preset}: {seen}, and {preset} has {known}."
        )


def _list_differing(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    return [name for name, size in wanted.items() if found.get(name) not in (None, size)]


def _list_language_sizes(config: LanguageConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in _LANGUAGE_SIZES}


def _list_sizes(config: ModelConfig) -> dict[str, object]:
    return {
        **_list_language_sizes(config.language),
        "template": config.template,
        "vision hidden_size": config.vision.hidden_size,
        "vision num_hidden_layers": config.vision.num_hidden_layers,
    }
