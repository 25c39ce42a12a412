"""Published shapes by name, optionally with fewer layers, for measurements without weights.

Owns   the look-up and the cut. Takes a name; gives a ModelConfig.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.presets import PRESETS


def find_preset(name: str) -> ModelConfig:
    """Look a shape up.

    Raises:
        ConfigError: no shape has that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"--preset is {name!r}; known are {', '.join(PRESETS)}.") from None


def cut_layers(
    config: ModelConfig, *, vision: int | None = None, language: int | None = None
) -> ModelConfig:
    """The same widths with at most that many layers on each side; None keeps all of a side."""
    return replace(
        config,
        vision=_cut(config.vision, vision),
        qformer=_cut(config.qformer, vision) if config.qformer else None,
        language=_cut(config.language, language),
    )


def _cut(part: Any, num_layers: int | None) -> Any:
    if num_layers is None:
        return part
    return replace(part, num_hidden_layers=min(num_layers, part.num_hidden_layers))
