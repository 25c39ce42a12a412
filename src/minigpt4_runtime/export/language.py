"""The language model alone, as a Hugging Face folder that vLLM and others read.

Owns   the published names, config.json with its `quantization_config`, and the layouts of
       compressed-tensors: "pack-quantized" where rows stay floats, "int-quantized" where they do
       not. The head becomes floats: few readers take any other.
Takes  a model folder in any format; gives a folder.
Never  holds more than one weight.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.checkpoint.blank_model import ModelWeight, blank_model, list_weights
from minigpt4_runtime.checkpoint.config_file import CONFIG_NAME, load_config
from minigpt4_runtime.checkpoint.file_kind import read_json
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME, FolderKind, staged_folder
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FolderTensors
from minigpt4_runtime.checkpoint.weights import DTYPE_CODES, WeightForm, read_folder_weights
from minigpt4_runtime.checkpoint.writer import (
    NamedWeight,
    total_bytes,
    write_bytes,
    write_text,
    write_weights,
)
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.contracts import WeightFormat
from minigpt4_runtime.formats.dense import DENSE, Dense
from minigpt4_runtime.formats.integer import IntegerFormat, unpack_words
from minigpt4_runtime.formats.registry import show_formats

_HEAD, _LAYERS = "language.head.weight", "language.layers."
_NAME_OF = {getattr(torch, name): name for name in DTYPE_CODES}


def _read_language_folder(folder: Path) -> None:
    if read_json(folder / CONFIG_NAME).get("model_type") != "llama":
        raise CheckpointError(f"{folder} holds no Llama.")


LANGUAGE_FOLDER = FolderKind("language model", CONFIG_NAME, _read_language_folder)


@dataclass(frozen=True)
class PublishedLanguage:
    """The language model of a model folder, by its published names."""

    config: LanguageConfig
    dtype: torch.dtype
    layer_format: Dense | IntegerFormat
    weights: Sequence[ModelWeight]
    tensors: Mapping[str, Tensor]

    def stream(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[NamedWeight]:
        """Its tensors one by one; of `tensors` in their place, if given."""
        for each in self.weights:
            found = _published(each, self.config, tensors or self.tensors, self.dtype)
            for name, tensor in found.items():
                yield NamedWeight(name, each.name, tensor)

    def settings(self, prefix: str = "") -> dict[str, Any]:
        """The content of its config.json; `prefix` begins the names of a reader's modules."""
        return _describe(self.config, self.dtype, self.layer_format, prefix)


def read_language(model_dir: Path) -> PublishedLanguage:
    """Find the language model of a model folder; its weights are read when they are asked for.

    Raises:
        CheckpointError: the model is damaged, or its layers are of several formats or of one that
            compressed-tensors has not, or adapters are kept apart.
    """
    config, choice = load_config(model_dir), read_manifest(model_dir).weight_format
    if config.language.adapters is not None:
        raise CheckpointError(
            f"{model_dir} keeps LoRA adapters beside its weights, which other programs would miss. "
            "Merge them into a model of floats, or convert without --keep-lora."
        )
    tensors = FolderTensors(read_folder_weights(model_dir))
    model = blank_model(config, formats=choice)
    weights = [each for each in list_weights(model) if each.name.startswith("language.")]
    layers = {each.weight_format for each in weights if each.name.startswith(_LAYERS)} - {None}
    (layer_format,) = layers if len(layers) == 1 else (None,)
    if layer_format is None or not isinstance(layer_format, Dense | IntegerFormat):
        raise CheckpointError(
            f"{model_dir} has layers that compressed-tensors cannot say ({show_formats(choice)}). "
            "Quantise the model with one of w8a16, w8a8, w4a16 and w4a8."
        )
    dtype = tensors["language.token_embedding.weight"].dtype
    return PublishedLanguage(config.language, dtype, layer_format, weights, tensors)


def export_language(model_dir: Path, out_dir: Path, *, force: bool = False) -> int:
    """Make `out_dir`, and say how many bytes its weights take.

    Raises:
        CheckpointError: see `read_language`; or `out_dir` cannot be written.
    """
    language = read_language(model_dir)
    # Shapes alone: the header comes before the weights.
    outlines = {name: tensor.to("meta") for name, tensor in language.tensors.items()}
    forms = {
        each.name: WeightForm(tuple(each.tensor.shape), _NAME_OF[each.tensor.dtype])
        for each in language.stream(outlines)
    }
    with staged_folder(
        out_dir, needed_bytes=total_bytes(forms), force=force, kind=LANGUAGE_FOLDER
    ) as folder:
        write_weights(folder, forms, language.stream())
        write_bytes(folder / TOKENIZER_NAME, (model_dir / TOKENIZER_NAME).read_bytes())
        write_text(folder / CONFIG_NAME, json.dumps(language.settings(), indent=2) + "\n")
    return total_bytes(forms)


def _published(
    weight: ModelWeight, config: LanguageConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What stands for a weight, by published names."""
    (published,) = language_origins(config)[weight.name].names
    found = weight.weight_format
    if found is None or found is DENSE:
        return {published: tensors[weight.name]}
    stem = weight.name.removesuffix("weight")
    parts = {name: tensors[f"{stem}{name}"] for name in found.parts(*weight.shape)}
    if weight.name == _HEAD:
        return {published: found.unpack(parts).to(dtype)}
    assert isinstance(found, IntegerFormat)
    stem = published.removesuffix("weight")
    return {f"{stem}{name}": part for name, part in _lay_out(found, parts).items()}


def _lay_out(found: IntegerFormat, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a weight in the layout that readers want for such rows."""
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if found.bits == 4 and found.rounds_rows:
        integers = unpack_words(parts["weight_packed"])
        zero = None if zero is None else unpack_words(zero.T).T.contiguous()
        return _without_none({"weight": integers, "weight_scale": scale, "weight_zero_point": zero})
    if found.rounds_rows:
        return dict(parts)
    if found.bits == 4:
        packed, columns = parts["weight_packed"], 8 * parts["weight_packed"].shape[1]
    else:
        packed, columns = _pack_bytes(parts["weight"]), parts["weight"].shape[1]
        zero = None if zero is None else _pack_bytes(zero.T).T.contiguous()
    shape = torch.tensor([len(packed), columns])
    return _without_none({
        "weight_packed": packed, "weight_scale": scale, "weight_shape": shape,
        "weight_zero_point": zero,
    })  # fmt: skip


def _without_none(parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: part for name, part in parts.items() if part is not None}


def _pack_bytes(integers: Tensor) -> Tensor:
    """Integers of 8 bits, int8 (N, K) → int32 (N, K / 4, rounded up), as numbers from 0 to 255."""
    missing = -integers.shape[1] % 4
    shifted = functional.pad(integers.short() + 128, (0, missing)).to(torch.uint8)
    return shifted.flatten().view(torch.int32).view(len(integers), -1)


def _describe(
    config: LanguageConfig, dtype: torch.dtype, layer_format: WeightFormat, prefix: str
) -> dict[str, Any]:
    """The content of config.json."""
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        **config.to_mapping(),
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": DTYPE_NAME_OF[dtype],
    }
    if isinstance(layer_format, IntegerFormat):
        settings["quantization_config"] = _quantization_config(layer_format, prefix)
    return settings


def _quantization_config(found: IntegerFormat, prefix: str) -> dict[str, Any]:
    """What compressed-tensors calls the layout."""
    layout = "int-quantized" if found.rounds_rows else "pack-quantized"
    strategy = "channel" if found.group_size is None else "group"
    weights = {
        "num_bits": found.bits, "type": "int", "symmetric": found.is_symmetric, "dynamic": False,
        "strategy": strategy, "group_size": found.group_size,
    }  # fmt: skip
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"], "weights": weights, "format": layout,
        "input_activations": rows if found.rounds_rows else None, "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": layout, "config_groups": {"group_0": group}, "ignore": [f"{prefix}lm_head"],
    }  # fmt: skip
