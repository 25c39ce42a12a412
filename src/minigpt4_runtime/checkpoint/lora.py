"""LoRA adapters of a language model, in the folders that PEFT writes.

Owns   the two files of such a folder, the names in them, and the check that they fit a model.
Takes  a folder and the config of a language model; gives the places of the factors by our names.
       Takes factors; gives the files' content.
Never  needs PEFT, and reads no pickle.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt4_runtime.checkpoint.file_kind import read_json, show_value
from minigpt4_runtime.checkpoint.mapped import refuse_not_finite
from minigpt4_runtime.checkpoint.weights import (
    DTYPE_CODES,
    StoredTensor,
    TensorShape,
    list_some,
    read_described,
    show_shape,
)
from minigpt4_runtime.checkpoint.writer import encode_tensors
from minigpt4_runtime.config import DTYPE_NAMES, AdapterConfig, LanguageConfig, Range
from minigpt4_runtime.errors import CheckpointError, ConfigError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# PEFT's name of a matrix, which is that of transformers' Llama → ours.
OWN_NAMES = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}
# The second "model." is absent where PEFT was given the Llama without its head.
_FACTOR = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight"
)
_SIDES = {"A": "low", "B": "high"}
_CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga")
_WANTED = "LoRA factors of the language model's layers, and nothing else, can be used."


@dataclass(frozen=True)
class Lora:
    """The factors of a folder. `metadata` is what the file of weights says of itself.

    A factor's name is "language.layers.0.attention.query.adapter.low": A, or "….high": B.
    """

    config: AdapterConfig
    factors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_lora(folder: Path, language: LanguageConfig) -> Lora:
    """Read where the factors lie, and check them against a model without opening its weights.

    Raises:
        CheckpointError: it is no LoRA of PEFT's, one of another model, or not finite.
    """
    settings = _read_settings(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_NAME}. Save the adapter again with PEFT's save_pretrained, "
            "which writes one unless safe_serialization is off."
        )
    stored, metadata = read_described(path)
    factors, unknown = {}, []
    for name, place in stored.items():
        if own := factor_name(name):
            factors[own] = place
        else:
            unknown.append(name)
    if unknown or not factors:
        what = f"holds {list_some(unknown)}" if unknown else "holds no LoRA factor"
        raise CheckpointError(f"{path} {what}. {_WANTED}")
    for name, place in factors.items():
        if place.dtype_code not in [DTYPE_CODES[each] for each in DTYPE_NAMES]:
            raise CheckpointError(
                f"{path}: {name} is of dtype {place.dtype_code}; {', '.join(DTYPE_NAMES)} can be "
                "used."
            )
    ranks = check_factors(path, {name: each.shape for name, each in factors.items()}, language)
    refuse_not_finite(stored)
    return Lora(AdapterConfig(_alpha(folder, settings, ranks), ranks), factors, metadata)


def factor_name(theirs: str) -> str | None:
    """Our name of a factor, by PEFT's; None where it is none of a layer's matrix."""
    found = _FACTOR.fullmatch(theirs)
    if found is None or found[2] not in OWN_NAMES:
        return None
    return f"language.layers.{int(found[1])}.{OWN_NAMES[found[2]]}.adapter.{_SIDES[found[3]]}"


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} has peft_type {show_value(settings, 'peft_type')}; only LORA can be used."
        )
    # Each of these changes what is computed, or adds weights of another kind.
    for name in (
        "use_dora", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
        "use_qalora", "alora_invocation_tokens", "layer_replication",
    ):  # fmt: skip
        if settings.get(name):
            raise CheckpointError(
                f"{path} has {name} {show_value(settings, name)}, which cannot be used here. "
                f"{_WANTED}"
            )
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path} has bias {show_value(settings, 'bias')}; only none can be used. {_WANTED}"
        )
    # These begin by taking what the factors hold out of the model's weights, which are not here.
    name = "init_lora_weights"
    if str(settings.get(name)).lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} has {name} {show_value(settings, name)}: its factors belong to weights that "
            "PEFT changed first. Convert them with save_pretrained's "
            "path_initial_model_for_weight_conversion."
        )
    return settings


def _alpha(folder: Path, settings: Mapping[str, Any], ranks: tuple[tuple[str, int], ...]) -> float:
    """The number that, divided by its rank, each change counts."""
    path, different = folder / CONFIG_NAME, sorted({rank for _, rank in ranks})
    alpha = float(_number(path, settings, "lora_alpha", Range(float, above=0, high=2**31)))
    # The factors have the ranks. This one tells whether both files are of one adapter.
    if "r" in settings:
        rank = _number(path, settings, "r", Range(int, 1, 2**31))
        if rank not in different and not settings.get("rank_pattern"):
            raise CheckpointError(
                f"{path} has r {rank}, and the factors in {WEIGHTS_NAME} have {different}. Give "
                "two files that were saved together."
            )
    if not settings.get("use_rslora"):
        return alpha
    # Kalajdzievski, 2023: alpha counts by the root of the rank.
    if len(different) > 1:
        raise CheckpointError(
            f"{path} has use_rslora, and ranks {different}; only a single rank can be used with it."
        )
    return alpha * math.sqrt(different[0])


def _number(path: Path, settings: Mapping[str, Any], name: str, allowed: Range) -> Any:
    try:
        allowed.check(name, settings.get(name))
    except ConfigError:
        kind = "" if allowed.kind is int else "a number "
        raise CheckpointError(
            f"{path} has {name} {show_value(settings, name)}; it must be {kind}{allowed}."
        ) from None
    return settings[name]


def encode_lora(
    factors: Mapping[str, Tensor], alpha: float, metadata: Mapping[str, str], base_name: str
) -> dict[str, bytes]:
    """The two files of a folder, the settings last. The names of `factors` are those of `Lora`.

    `alpha`, divided by a factor's rank, is what its change counts. `base_name` is the model's.
    """
    published = {ours: theirs for theirs, ours in OWN_NAMES.items()}
    sides = {side: letter for letter, side in _SIDES.items()}
    tensors: dict[str, Tensor] = {}
    targets: dict[str, None] = {}
    ranks = set()
    for name, tensor in factors.items():
        owner, _, side = name.partition(".adapter.")
        _, _, number, own = owner.split(".", 3)
        targets[published[own].rpartition(".")[2]] = None
        stem = f"base_model.model.model.layers.{number}.{published[own]}"
        tensors[f"{stem}.lora_{sides[side]}.weight"] = tensor
        if side == "low":
            ranks.add(len(tensor))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "r": max(ranks), "lora_alpha": alpha, "lora_dropout": 0.0,
        "target_modules": list(targets), "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    return {
        WEIGHTS_NAME: encode_tensors(tensors, {"format": "pt", **metadata}),
        CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(),
    }


def check_factors(
    path: Path, shapes: Mapping[str, TensorShape], language: LanguageConfig
) -> tuple[tuple[str, int], ...]:
    """The rank of each changed matrix, from the shapes of the factors by our names.

    Raises:
        CheckpointError: a factor has no counterpart, or does not fit the model.
    """
    ranks = {}
    matrices = matrix_shapes(language)
    for owner in dict.fromkeys(name.rpartition(".adapter.")[0] for name in shapes):
        sides = [shapes.get(f"{owner}.adapter.{side}") for side in _SIDES.values()]
        _, _, number, matrix = owner.split(".", 3)
        low, high = sides
        if low is None or high is None:
            raise CheckpointError(f"{path} has only one of two LoRA factors of {owner}. {_WANTED}")
        if int(number) >= language.num_hidden_layers:
            raise CheckpointError(
                f"{path} changes layer {number} of a language model, and this one has "
                f"{language.num_hidden_layers}. Give the model that the adapter was made for."
            )
        out_features, in_features = matrices[matrix]
        rank = low[0] if low else 0
        if low != (rank, in_features) or high != (out_features, rank) or not rank:
            raise CheckpointError(
                f"{path}: the factors of {owner} are {show_shape(low)} and "
                f"{show_shape(high)}, and the weight is "
                f"{show_shape((out_features, in_features))}. Give the model that the adapter was "
                "made for."
            )
        ranks[owner.removeprefix("language.")] = rank
    return tuple(ranks.items())


def matrix_shapes(language: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of each matrix of a layer."""
    size, gated = language.hidden_size, language.intermediate_size
    q_size = language.num_attention_heads * language.head_dim
    kv_size = language.num_key_value_heads * language.head_dim
    return {
        "attention.query": (q_size, size),
        "attention.key": (kv_size, size),
        "attention.value": (kv_size, size),
        "attention.out": (size, q_size),
        "mlp_gate": (gated, size),
        "mlp_up": (gated, size),
        "mlp_down": (size, gated),
    }
