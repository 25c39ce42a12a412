"""The published language model: a Hugging Face folder of a Llama.

Owns   what its config.json may say, which of its files are the weights, and its tokenizer.
Takes  the folder; gives its LanguageConfig, the paths of its shards and of tokenizer.model.
Never  opens a shard.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import read_head, read_json
from minigpt4_runtime.checkpoint.weights import list_indexed_files, list_some
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.tokenizer import Tokenizer

# Safetensors first: a folder that has both needs no pickle to be opened.
_WEIGHT_FILES = (
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
_SHARD_NAME = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>\.\w+)")
_OTHER_MODEL = "Take the language model that this MiniGPT-4 was made for."


@dataclass(frozen=True)
class LanguageFolder:
    """What the folder holds. `is_tied`: the head has the weights of the embedding table."""

    path: Path
    config: LanguageConfig
    is_tied: bool
    weight_paths: tuple[Path, ...]
    tokenizer_path: Path


def read_language_folder(path: Path) -> LanguageFolder:
    """Read what the folder says about itself and find its files.

    Raises:
        CheckpointError: it is no such folder, lacks a file, or holds another kind of model.
    """
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {state}; --language wants the folder of the published language model."
        )
    values = read_json(path / "config.json")
    config = read_llama_config(path / "config.json", values)
    return LanguageFolder(
        path,
        config,
        values.get("tie_word_embeddings") is True,
        _find_weights(path),
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
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise CheckpointError(f"{path} lacks {list_some(missing)}. Take the published file again.")
    heads = values["num_attention_heads"]
    optional = {
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": _read_rope_theta(path, values),
    }
    found = {name: values[name] for name in optional if values.get(name) is not None}
    try:
        config = LanguageConfig(**{name: values[name] for name in names}, **(optional | found))
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise CheckpointError(
            f"{path}: head_dim is {values['head_dim']!r}, but {heads} heads of a width of "
            f"{config.hidden_size} are {config.head_dim} wide; this is not known. {_OTHER_MODEL}"
        )
    return config


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
            f"{path} describes {names[0]} of model_type {kind!r}; only 'llama' "
            f"(LlamaForCausalLM) is known. {_OTHER_MODEL}"
        )
    refused = {
        "rope_scaling": (None,),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "hidden_act": (None, "silu"),
        "quantization_config": (None,),
    }
    for name, allowed in refused.items():
        if values.get(name) not in allowed:
            raise CheckpointError(
                f"{path}: {name} is {str(values[name])[:80]!r}; only {allowed[-1]!r} is known. "
                f"{_OTHER_MODEL}"
            )


def _read_rope_theta(path: Path, values: Mapping[str, Any]) -> float:
    """Transformers 5 keeps rope_theta inside rope_parameters; before, it was a name of its own."""
    parameters = values.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{path}: rope_parameters is {str(parameters)[:80]!r}; only the rope_type 'default' "
            f"is known. {_OTHER_MODEL}"
        )
    return parameters.get("rope_theta", 10000.0)  # type: ignore[no-any-return]


def _find_weights(path: Path) -> tuple[Path, ...]:
    for index_name, pattern in _WEIGHT_FILES:
        if (path / index_name).exists():
            return list_indexed_files(path / index_name)
        if paths := sorted(path.glob(pattern)):
            _require_all_shards(path, paths)
            return tuple(paths)
    hint = (
        "It holds Meta's own format; take the folder published for transformers (its name ends in "
        "-hf)."
        if any(path.glob("consolidated.*.pth"))
        else "Download the weights into it."
    )
    raise CheckpointError(f"{path} holds no model*.safetensors and no pytorch_model*.bin. {hint}")


def _require_all_shards(folder: Path, paths: list[Path]) -> None:
    """Without an index the names alone say how many shards there are."""
    present = {path.name for path in paths}
    wanted = set()
    for match in filter(None, (_SHARD_NAME.fullmatch(name) for name in present)):
        total = int(match["total"])
        wanted |= {
            f"{match['start']}-{number:05d}-of-{total:05d}{match['end']}"
            for number in range(1, min(total, 1000) + 1)
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
