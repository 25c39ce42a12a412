"""Where a model's weights come from: a folder, or random numbers in a shape.

Owns   the two ways to fill a model, or a rank's part of its language model.
Takes  a folder or a ModelConfig; goes from rank to rank as a mapping.
Never  chooses a device or a dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt4_runtime.checkpoint.blank_model import blank_language, blank_model
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model
from minigpt4_runtime.model.parallel import Group


@dataclass(frozen=True)
class WeightSource:
    """A model folder, or without one a shape whose weights are drawn with `seed`."""

    config: ModelConfig
    model_dir: Path | None = None
    seed: int = 0

    @classmethod
    def folder(cls, model_dir: Path) -> WeightSource:
        """The weights of a model folder.

        Raises:
            CheckpointError: it is none.
        """
        return cls(load_config(model_dir), model_dir)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `from_mapping` reads back."""
        model_dir = str(self.model_dir) if self.model_dir else None
        return {"config": self.config.to_mapping(), "model_dir": model_dir, "seed": self.seed}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WeightSource:
        """What `to_mapping` gave."""
        model_dir = Path(values["model_dir"]) if values["model_dir"] else None
        return cls(ModelConfig.from_mapping(values["config"]), model_dir, values["seed"])

    def load_model(
        self, *, device: torch.device, dtype: torch.dtype, free_bytes: int | None, group: Group
    ) -> MiniGPT4Model:
        """Both sides, the language model being this rank's part. See `load.load_model`."""
        if self.model_dir is not None:
            return load_model(
                self.model_dir, device=device, dtype=dtype, free_bytes=free_bytes, group=group
            )
        model = blank_model(self.config, group)
        fill_at_random(model, device=device, dtype=dtype, free_bytes=free_bytes, seed=self.seed)
        return model

    def load_language(
        self, *, device: torch.device, dtype: torch.dtype, free_bytes: int | None, group: Group
    ) -> Llama:
        """This rank's part of the language model alone."""
        if self.model_dir is not None:
            return load_language(
                self.model_dir, device=device, dtype=dtype, free_bytes=free_bytes, group=group
            )
        language = blank_language(self.config.language, group)
        # Ranks that drew alike would hold the same rows.
        seed = self.seed + group.rank
        fill_at_random(language, device=device, dtype=dtype, free_bytes=free_bytes, seed=seed)
        return language
