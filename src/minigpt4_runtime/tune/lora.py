"""LoRA on a language model that stays as it is (Hu et al., 2021), in the files of PEFT.

Owns   the adapters that learn, their names elsewhere, and the folder that holds them.
Takes  a language model and settings; gives adapters, and two files that PEFT reads as well.
Never  needs PEFT: its format is two matrices for each weight and a few settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.adapter import described
from minigpt4_runtime.checkpoint.lora import CONFIG_NAME, OWN_NAMES, WEIGHTS_NAME
from minigpt4_runtime.checkpoint.writer import encode_tensors
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
    published = {ours: theirs for theirs, ours in OWN_NAMES.items()}
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        _, number, own = name.split(".", 2)
        stem = f"base_model.model.model.layers.{number}.{published[own]}"
        tensors[f"{stem}.lora_A.weight"] = adapter.low
        tensors[f"{stem}.lora_B.weight"] = adapter.high
    content = encode_tensors(tensors, {"format": "pt", **described(record)})
    write_whole(out_dir / WEIGHTS_NAME, content)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": record["model"],
        "r": settings.lora, "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0,
        "target_modules": list(settings.lora_targets), "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    write_whole(out_dir / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
