"""The source of a model's weights: a folder, or random numbers in a shape.

Owns   the two ways to fill a model, or a rank's part of its language model.
Takes  a folder or a ModelConfig; is sent to other ranks as a mapping.
Never  chooses a device or a dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from minigpt4_runtime.checkpoint.adapters import adapted
from minigpt4_runtime.checkpoint.blank_model import Where, blank_for
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model


@dataclass(frozen=True)
class WeightSource:
    """A model folder, or without one a shape whose weights are drawn with `seed`.

    The manifest of a folder has the formats of its weights. `config` is the folder's, with the
    settings for long sequences that a user has chosen, and what an `adapter` adds to its language
    model. Of the named `adapters` each request may choose one; see `choices`.
    """

    config: ModelConfig
    model_dir: Path | None = None
    seed: int = 0
    formats: FormatChoice = DENSE.name
    adapter: Path | None = None
    adapters: tuple[tuple[str, Path], ...] = ()

    @classmethod
    def folder(
        cls,
        model_dir: Path,
        *,
        rope_scaling: object = None,
        max_context: int | None = None,
        adapter: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> WeightSource:
        """The weights of a model folder. See `LanguageConfig.stretched` for the settings.

        Raises:
            CheckpointError: it is none, or the adapter is damaged or another model's.
            ConfigError: a setting has no meaning.
        """
        if adapter is not None and adapters:
            raise ConfigError(
                "adapter and adapters are both given: the one is for all requests, the others are "
                "chosen by each. Name all of them, or give one alone."
            )
        config = adapted(load_config(model_dir), adapter, model_dir)
        language = config.language.stretched(rope_scaling, max_context)
        named = tuple((adapters or {}).items())
        config = replace(config, language=language)
        return cls(config, model_dir, adapter=adapter, adapters=named)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `from_mapping` reads back."""
        plain: dict[str, Any] = {
            "config": self.config.to_mapping(),
            "seed": self.seed,
            "formats": self.formats,
        }
        plain["adapters"] = [(name, str(path)) for name, path in self.adapters]
        places = {"model_dir": self.model_dir, "adapter": self.adapter}
        return plain | {name: str(path) if path else None for name, path in places.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WeightSource:
        """Read what `to_mapping` gave."""
        places = (values["model_dir"], values["adapter"])
        model_dir, adapter = (Path(place) if place else None for place in places)
        config = ModelConfig.from_mapping(values["config"])
        named = tuple((name, Path(path)) for name, path in values["adapters"])
        return cls(config, model_dir, values["seed"], values["formats"], adapter, named)

    def load_model(self, **where: Unpack[Where]) -> MiniGPT4Model:
        """Both sides, the language model being this rank's part. See `load.load_model`."""
        if self.model_dir is not None:
            return load_model(self.model_dir, self.config, adapter=self.adapter, **where)
        blank = blank_for(where, self.config, self.formats)
        return fill_at_random(blank, seed=self.seed, **where)

    def load_language(self, **where: Unpack[Where]) -> Llama:
        """This rank's part of the language model alone."""
        if self.model_dir is not None:
            return load_language(self.model_dir, self.config, adapter=self.adapter, **where)
        language = blank_for(where, self.config, self.formats).language
        # With one seed all ranks would hold the same rows.
        return fill_at_random(language, seed=self.seed + where["group"].rank, **where)
