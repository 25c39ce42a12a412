"""A CLIP model in open_clip's layout, converted to transformers' names and shapes.

Owns   the key map, and facts that open_clip's weights lack: the width of heads and the GELU.
Takes  open_clip_pytorch_model.bin, with open_clip_config.json beside it or without.
Never  runs code from a pickle.
"""

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime.errors import CheckpointError

FILE_NAME = "open_clip_pytorch_model.bin"
CONFIG_NAME = "open_clip_config.json"
Weights = dict[str, Tensor]

# The heads of published image towers by width; text heads are 64 wide. From open_clip's
# model_configs: ViT-B, ViT-L, ViT-H-14, ViT-g-14, ViT-bigG-14.
_VISION_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_TEXT_HEAD_WIDTH = 64

_PARTS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # Spelt so in transformers.
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_IN_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_FUSED = "attn.in_proj"  # Query, key and value stacked.
_LAYER = re.compile(
    r"(visual\.)?transformer\.resblocks\.(\d+)\."
    rf"({'|'.join(map(re.escape, (*_IN_LAYERS, _FUSED)))})[._](weight|bias)"
)
_NOT_WEIGHTS = {"attn_mask"}  # Older files keep the causal mask.


def read(path: Path) -> tuple[dict[str, Any], Weights]:
    """The arguments of a CLIPConfig, and the weights as a CLIPModel names them.

    Raises:
        CheckpointError: the file is damaged or has another layout.
    """
    weights = _load(path)
    try:
        return _config(weights, _read_config(path.parent)), dict(_rename_all(weights, path))
    except KeyError as error:
        raise CheckpointError(
            f"{path} has no weight {error.args[0]}. Give a CLIP of open_clip with a ViT, such as "
            "ViT-H-14, or a folder in Hugging Face layout."
        ) from None


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """`mean` and `std` of images from open_clip_config.json, if it has them."""
    given = _read_config(folder).get("preprocess_cfg", {})
    means = {name: given[name] for name in ("mean", "std") if name in given}
    for name, levels in means.items():
        are_numbers = isinstance(levels, list) and all(isinstance(v, (int, float)) for v in levels)
        if not are_numbers or len(levels) != 3:
            raise _strange(folder / CONFIG_NAME, name, levels, "three numbers")
    return means


def _load(path: Path) -> Weights:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Torch's own message advises to run the code in the file.
        raise CheckpointError(
            f"{path} is no file of weights alone, and what else it holds is not run. Download it "
            "again."
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}). Download it again.") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    return {name: weight for name, weight in weights.items() if name not in _NOT_WEIGHTS}


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of open_clip_config.json, with its parts and counts checked."""
    path = folder / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object. Download it again.")
    model = _part(config, "model_cfg", path)
    _part(config, "preprocess_cfg", path)
    for part, name in (("text_cfg", "heads"), ("vision_cfg", "head_width")):
        count = _part(model, part, path).get(name, 1)
        if not isinstance(count, int) or count < 1:
            raise _strange(path, name, count, "a whole number above 0")
    return config


def _part(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    part = config.get(name, {})
    if not isinstance(part, dict):
        raise _strange(path, name, part, "an object")
    return part


def _strange(path: Path, name: str, found: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {found!r}, and must be {wanted}. Download the file again."
    )


def _rename_all(weights: Weights, path: Path) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        if name in _PARTS:
            yield _PARTS[name], weight
        elif name in _TRANSPOSED:
            yield _TRANSPOSED[name], weight.T.contiguous()
        elif found := _LAYER.fullmatch(name):
            yield from _rename_in_layer(found, weight)
        else:
            raise CheckpointError(
                f"{path} holds {name}, which no CLIP with two plain transformers has. Give "
                "another judge."
            )


def _rename_in_layer(found: re.Match[str], weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    visual, layer, part, kind = found.groups()
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
    if part == _FUSED:
        for name, third in zip("qkv", weight.chunk(3), strict=True):
            yield f"{prefix}.self_attn.{name}_proj.{kind}", third.contiguous()
    else:
        yield f"{prefix}.{_IN_LAYERS[part]}.{kind}", weight


def _config(weights: Weights, published: Mapping[str, Any]) -> dict[str, Any]:
    model = published.get("model_cfg", {})
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {
        "projection_dim": weights["text_projection"].shape[1],
        "text_config": _text_config(weights, model.get("text_cfg", {}), activation),
        "vision_config": _vision_config(weights, model.get("vision_cfg", {}), activation),
    }


def _text_config(weights: Weights, text: Mapping[str, Any], activation: str) -> dict[str, Any]:
    vocab_size, width = weights["token_embedding.weight"].shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "projection_dim": weights["text_projection"].shape[1],
        "num_hidden_layers": _count_layers(weights, "transformer.resblocks."),
        "num_attention_heads": text.get("heads", width // _TEXT_HEAD_WIDTH),
        "max_position_embeddings": weights["positional_embedding"].shape[0],
        "hidden_act": activation,
        # open_clip reads a text's row at its highest id, which is the end of the text.
        "eos_token_id": vocab_size - 1,
    }


def _vision_config(weights: Weights, vision: Mapping[str, Any], activation: str) -> dict[str, Any]:
    width, num_channels, patch_size, _ = weights["visual.conv1.weight"].shape
    num_patches = weights["visual.positional_embedding"].shape[0] - 1
    head_width = vision.get("head_width")
    num_heads = width // head_width if head_width else _VISION_HEADS.get(width)
    if num_heads is None:
        raise CheckpointError(
            f"The judge's image tower is {width} wide, and its weights do not say how wide its "
            "heads are. Put the model's open_clip_config.json beside it."
        )
    return {
        "hidden_size": width,
        "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "projection_dim": weights["visual.proj"].shape[1],
        "num_hidden_layers": _count_layers(weights, "visual.transformer.resblocks."),
        "num_attention_heads": num_heads,
        "num_channels": num_channels,
        "image_size": patch_size * math.isqrt(num_patches),
        "patch_size": patch_size,
        "hidden_act": activation,
    }


def _count_layers(weights: Weights, prefix: str) -> int:
    return len({name.split(".")[prefix.count(".")] for name in weights if name.startswith(prefix)})
