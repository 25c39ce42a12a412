"""LoRA on a language model that stays as it is (Hu et al., 2021), in the files of PEFT.

Owns   the adapters that learn, their names elsewhere, and the folder that holds them.
Takes  a language model and settings; gives adapters, and two files that PEFT reads as well.
Never  needs PEFT: its format is two matrices for each weight and a few settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.adapter import described
from minigpt4_runtime.checkpoint.lora import OWN_NAMES, encode_lora, matrix_shapes
from minigpt4_runtime.checkpoint.weights import show_shape
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.model.adapter import Adapter
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.report.files import write_whole
from minigpt4_runtime.tune.settings import TuneSettings

# A matrix's own name, by the last word of the one that others have for it.
OWN_NAME_OF = {theirs.rpartition(".")[2]: ours for theirs, ours in OWN_NAMES.items()}


class LearnedAdapter(Adapter):
    """Factors in float32, beside a model that computes in any dtype."""

    def forward(self, rows: Tensor) -> Tensor:
        """See `Addition`."""
        low, high = self.low.to(rows.dtype), self.high.to(rows.dtype)
        return functional.linear(functional.linear(rows, low) * self.scale, high)


def check_rank(settings: TuneSettings, language: LanguageConfig) -> None:
    """Refuse a rank that no change of a matrix can have.

    Raises:
        ConfigError: a matrix among the targets has a shorter side.
    """
    shapes = matrix_shapes(language)
    for target in settings.lora_targets:
        out_features, in_features = shapes[OWN_NAME_OF[target]]
        if settings.lora > (largest := min(out_features, in_features)):
            raise ConfigError(
                f"lora is {settings.lora}, and {target} of this model is "
                f"{show_shape((out_features, in_features))}: no change of it has a rank above "
                f"{largest}. Lower lora."
            )


def adapt(
    language: Llama, settings: TuneSettings, device: torch.device
) -> dict[str, LearnedAdapter]:
    """Put adapters on a language model, which compute as it did before; by its matrices' names.

    As in PEFT, A is drawn evenly between ±1/√in, and B is 0.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    adapters = {}
    for number in range(len(language.layers) if settings.lora else 0):
        for target in settings.lora_targets:
            name = f"layers.{number}.{OWN_NAME_OF[target]}"
            linear = language.get_submodule(name)
            assert isinstance(linear, Linear)
            out_features, in_features = linear.shape
            adapter = LearnedAdapter(
                in_features, out_features, rank=settings.lora,
                scale=settings.lora_alpha / settings.lora,
            )  # fmt: skip
            bound = in_features**-0.5
            nn.init.uniform_(adapter.low, -bound, bound, generator=generator)
            nn.init.zeros_(adapter.high)
            linear.adapter = adapters[name] = adapter.to(device)
    return adapters


def write_lora(
    out_dir: Path,
    adapters: Mapping[str, LearnedAdapter],
    settings: TuneSettings,
    record: Mapping[str, Any],
) -> None:
    """Write both files; the settings come last, so that there is an adapter only when it is whole.

    Raises:
        ConfigError: a file cannot be written.
    """
    factors = {
        f"language.{name}.adapter.{side}": tensor
        for name, adapter in adapters.items()
        for side, tensor in adapter.named_parameters()
    }
    files = encode_lora(factors, settings.lora_alpha, described(record), record["model"])
    for name, content in files.items():
        write_whole(out_dir / name, content)
