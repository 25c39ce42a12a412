"""Published shapes by name, optionally with fewer layers, for measurements without weights.

Owns   the look-up and the cut. Takes a name; gives a ModelConfig.
"""

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
    if name not in PRESETS:
        raise ConfigError(f"--preset is {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]


def cut_layers(
    config: ModelConfig, *, vision: int | None = None, language: int | None = None
) -> ModelConfig:
    """The same widths with at most that many layers on each side; None keeps all of a side."""

    def cut(part: Any, most: int | None) -> Any:
        if part is None or most is None:
            return part
        return replace(part, num_hidden_layers=min(most, part.num_hidden_layers))

    return replace(
        config,
        vision=cut(config.vision, vision),
        qformer=cut(config.qformer, vision),
        language=cut(config.language, language),
    )
