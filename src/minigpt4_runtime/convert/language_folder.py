"""The published language model: a Hugging Face folder of a Llama.

Owns   the settings that its config.json may have, and the names of its weight files and tokenizer.
Takes  the folder; gives its LanguageConfig, the paths of its shards and of tokenizer.model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import (
    as_number,
    read_head,
    read_json,
    refuse_adapter,
    show_value,
)
from minigpt4_runtime.checkpoint.weights import list_indexed_files, list_some
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.rope_scaling import RopeScaling
from minigpt4_runtime.text.tokenizer import Tokenizer

# Safetensors first: a folder that has both needs no pickle to be opened.
_WEIGHT_FILES = (
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
_SHARD_NAME = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>\.\w+)")
_OTHER_MODEL = "Take the language model that this MiniGPT-4 was made for."


def _one_of(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value in allowed


def _is_read(quantisation: object) -> bool:
    """Whether weights of this quantisation are read: bitsandbytes' 8 bits are."""
    return quantisation is None or (
        isinstance(quantisation, Mapping) and quantisation.get("load_in_8bit") is True
    )


# Settings of config.json: a check whether our Llama computes a value, and the known ones in words.
_KNOWN_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "partial_rotary_factor": (_one_of(None, 1), "1"),
    "attention_bias": (_one_of(None, False), "false"),
    "mlp_bias": (_one_of(None, False), "false"),
    "hidden_act": (_one_of(None, "silu", "swish"), '"silu"'),
    "quantization_config": (_is_read, "null or load_in_8bit"),
}


@dataclass(frozen=True)
class LanguageFolder:
    """The content of the folder. If it `is_tied`, the head has the embedding table's weights."""

    path: Path
    config: LanguageConfig
    is_tied: bool
    weight_paths: tuple[Path, ...]
    tokenizer_path: Path


def read_language_folder(path: Path, *, needs_weights: bool = True) -> LanguageFolder:
    """Read the folder's settings and find its files.

    Without `needs_weights` the folder may have none, since another file has them.

    Raises:
        CheckpointError: it is no such folder, lacks a file, or holds another kind of model.
    """
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {state}; --language wants the folder of the published language model."
        )
    if not _has_weights(path):
        refuse_adapter(path)
    values = read_json(path / "config.json")
    config = read_llama_config(path / "config.json", values)
    return LanguageFolder(
        path,
        config,
        values.get("tie_word_embeddings") is True,
        find_weights(path) if needs_weights or _has_weights(path) else (),
        _find_tokenizer(path, config.vocab_size),
    )


def read_llama_config(path: Path, values: Mapping[str, Any]) -> LanguageConfig:
    """Turn a Llama's config.json into ours.

    Raises:
        CheckpointError: it describes something that our Llama does not compute.
    """
    _refuse_other_models(path, values)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "vocab_size",
    )  # fmt: skip
    missing = [f"{n} ({show_value(values, n)})" for n in names if values.get(n) is None]
    if missing:
        raise CheckpointError(f"{path} lacks {list_some(missing)}. Take the published file again.")
    optional = {
        "num_key_value_heads": values["num_attention_heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    rope_scaling, inner = _read_rope(path, values)
    found = {**{name: values.get(name) for name in optional}, **inner}
    found = {name: value for name, value in found.items() if value is not None}
    chosen = {**{name: values[name] for name in names}, **optional, **found}
    numbers = {name: as_number(value) for name, value in chosen.items()}
    try:
        config = LanguageConfig.from_mapping({**numbers, "rope_scaling": rope_scaling})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if as_number(values.get("head_dim")) not in (None, config.head_dim):
        raise CheckpointError(
            f"{path}: head_dim is {show_value(values, 'head_dim')}, but "
            f"{config.num_attention_heads} heads of a width of {config.hidden_size} are "
            f"{config.head_dim} wide; this is not known. {_OTHER_MODEL}"
        )
    return config


def _read_rope(
    path: Path, values: Mapping[str, Any]
) -> tuple[RopeScaling | None, dict[str, object]]:
    """The scaling of positions, and the `rope_theta` that stands beside it, if there is one.

    Transformers 5 has rope_parameters, in which rope_theta counts first; earlier ones, and all
    where both are given, rope_scaling.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(name) or None
    if isinstance(given, Mapping):
        given = {key: as_number(value) for key, value in given.items()}
        # Where it stands outside too, transformers takes that.
        outer = as_number(values.get("original_max_position_embeddings"))
        if outer is not None and given.get("rope_type", given.get("type")) in ("yarn", "llama3"):
            given["original_max_position_embeddings"] = outer
    try:
        if isinstance(given, str):
            raise ConfigError("named values are wanted.")
        scaling = RopeScaling.read(given)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: {name} is {show_value(values, name)}; {error} {_OTHER_MODEL}"
        ) from None
    inner = given.get("rope_theta") if isinstance(given, Mapping) else None
    return scaling, {} if inner is None else {"rope_theta": inner}


def _refuse_other_models(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("model_type")
    if kind == "minigpt4":
        raise CheckpointError(
            f"{path.parent} is a MiniGPT-4 model folder already: nothing is left to convert."
        )
    architectures = values.get("architectures") or ["LlamaForCausalLM"]
    names = architectures if isinstance(architectures, list) else [architectures]
    # Folders converted in early 2023 write LLaMAForCausalLM.
    is_causal = "llamaforcausallm" in [str(name).lower() for name in names]
    if kind != "llama" or not is_causal:
        raise CheckpointError(
            f"{path} describes {names[0]} of model_type {show_value(values, 'model_type')}; only "
            f'"llama" (LlamaForCausalLM) is known. {_OTHER_MODEL}'
        )
    for name, (is_known, known) in _KNOWN_SETTINGS.items():
        if not is_known(values.get(name)):
            raise CheckpointError(
                f"{path}: {name} is {show_value(values, name)}; only {known} is known. "
                f"{_OTHER_MODEL}"
            )


def _has_weights(path: Path) -> bool:
    return any(any(path.glob(pattern)) for _, pattern in _WEIGHT_FILES)


def find_weights(path: Path) -> tuple[Path, ...]:
    """The files of a folder that hold the language model's weights.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder; one with a language model's weights is wanted."
        )
    for index_name, pattern in _WEIGHT_FILES:
        if (path / index_name).exists():
            return list_indexed_files(path / index_name)
        if paths := sorted(path.glob(pattern)):
            _require_all_shards(path, paths)
            return tuple(paths)
    refuse_adapter(path)
    hint = "Download the weights into it."
    if any(path.glob("consolidated.*.pth")):
        hint = "It holds Meta's own format; take the one for transformers (its name ends in -hf)."
    raise CheckpointError(f"{path} holds no model*.safetensors and no pytorch_model*.bin. {hint}")


def _require_all_shards(folder: Path, paths: list[Path]) -> None:
    """Without an index the names alone say how many shards there are."""
    present = {path.name for path in paths}
    wanted = {
        f"{match['start']}-{number:05d}-of-{match['total']}{match['end']}"
        for match in filter(None, map(_SHARD_NAME.fullmatch, present))
        for number in range(1, min(int(match["total"]), 1000) + 1)
    }
    if missing := sorted(wanted - present):
        raise CheckpointError(
            f"{folder} lacks {list_some(missing)}. Download what is missing into that folder."
        )


def _find_tokenizer(folder: Path, vocab_size: int) -> Path:
    path = folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(
            f"{folder} holds no tokenizer.model. Take it from the published folder "
            "(tokenizer.json is not read)."
        )
    read_head(path)
    known = Tokenizer(path).vocab_size
    if known > vocab_size:
        raise CheckpointError(
            f"{path} knows {known} pieces, but the vocabulary of the language model has "
            f"{vocab_size}. Take the tokenizer.model that belongs to this model."
        )
    return path
