"""The model's configuration, read from the shapes of the published files.

Owns   every width and depth, and the sentences about files that do not belong together.
Takes  the inventories of the published files; gives a ModelConfig.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt4_runtime.checkpoint.file_kind import as_number, read_json, show_value
from minigpt4_runtime.checkpoint.weights import TensorShape, show_shape
from minigpt4_runtime.config import AdapterConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.key_map import EVA_VIT_DEPTHS
from minigpt4_runtime.convert.language_folder import LanguageFolder
from minigpt4_runtime.convert.layouts import Layout
from minigpt4_runtime.convert.training import Training
from minigpt4_runtime.convert.wrapping import describe_layout, is_of_whole_model
from minigpt4_runtime.errors import CheckpointError, ConfigError

# EVA-ViT-g's heads are this wide (upstream: num_heads=1408//88).
VISION_HEAD_WIDTH = 88
PATCHES_PER_ROW = 4

_VISION_REMEDY = "--vision wants the image tower, published as eva_vit_g.pth."
_QFORMER_REMEDY = "--qformer wants BLIP-2's file, published as blip2_pretrained_flant5xxl.pth."
_PROJECTION_REMEDY = "--projection wants MiniGPT-4's own file, published as pretrained_minigpt4*."
_BERT_REMEDY = "--bert wants the folder of bert-base-uncased, which the Q-Former was made from."


@dataclass(frozen=True)
class Published:
    """The weights by part. Other parts' weights in a projection file replace the published ones.

    With `adapters` the language model's factors stay apart; `merged` has them in its weights.
    """

    layout: Layout
    parts: Mapping[str, Inventory]
    language_folder: LanguageFolder
    training: Training
    bert_dir: Path | None
    merged: Inventory
    adapters: AdapterConfig | None = None


def detect_config(published: Published, image_size: int | None = None) -> ModelConfig:
    """Find the variant and every size; `image_size` asks for another than that of training.

    Raises:
        CheckpointError: a file has another role than its option, two files do not fit, or nothing
            tells the image size.
        ConfigError: `image_size` does not fit the patches.
    """
    _check_language_depth(published)
    vision = _read_vision(published.parts["vision"], image_size)
    if image_size is None:
        vision = replace(vision, image_size=_find_image_size(published, vision))
    qformer = _read_qformer(published, vision.hidden_size)
    _check_projection(published, vision, qformer)
    return ModelConfig(
        vision=vision,
        qformer=qformer,
        language=replace(published.language_folder.config, adapters=published.adapters),
        template=published.layout.template,
        patches_per_row=PATCHES_PER_ROW,
    )


def _check_language_depth(published: Published) -> None:
    """A wrong depth could be too large even for a model on the meta device."""
    said = published.language_folder.config.num_hidden_layers
    language = published.parts["language"]
    found = len(_list_layers(language, r"model\.layers\.(\d+)\..*"))
    if said > found:
        told = describe_layout(language.recipes)
        raise CheckpointError(
            f"{language.path}: config.json says num_hidden_layers {said}, and the "
            f"weights have {found}. {told or 'Take all files of one download.'}"
        )


def _read_vision(inventory: Inventory, image_size: int | None) -> VisionConfig:
    kernel = inventory.shape("patch_embed.proj.weight", remedy=_VISION_REMEDY)
    rows = inventory.shape("pos_embed", remedy=_VISION_REMEDY)
    if len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3] or len(rows) != 3:
        raise CheckpointError(
            f"{inventory.path}: patch_embed.proj.weight is {show_shape(kernel)} and pos_embed "
            f"{show_shape(rows)}; C×3×patch×patch and 1×rows×C are known. {_VISION_REMEDY}"
        )
    width, patch = kernel[0], kernel[2]
    if width % VISION_HEAD_WIDTH:
        raise CheckpointError(
            f"{inventory.path} is {width} wide, which is no multiple of the {VISION_HEAD_WIDTH} "
            f"of one attention head. {_VISION_REMEDY}"
        )
    side = math.isqrt(max(rows[1] - 1, 0))
    if side < 1 or side * side != rows[1] - 1:
        raise CheckpointError(
            f"{inventory.path}: pos_embed has {rows[1]} rows; one and a square number are known "
            f"(257 at 224 pixels). {_VISION_REMEDY}"
        )
    feed_forward = inventory.shape("blocks.0.mlp.fc1.weight", remedy=_VISION_REMEDY)
    depth = _read_depth(inventory, width)
    return VisionConfig(
        image_size=image_size if image_size is not None else side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // VISION_HEAD_WIDTH,
        intermediate_size=feed_forward[0],
    )


def _find_image_size(published: Published, vision: VisionConfig) -> int:
    """The side of a picture in training, in pixels; the position table may be for another."""
    known = published.layout.image_sizes
    if known is None:
        return vision.image_size
    width = vision.hidden_size
    size = published.training.image_size or known.get(width)
    if size is None:
        sizes = ", ".join(f"{pixels} for a width of {wide}" for wide, pixels in known.items())
        raise CheckpointError(
            f"Nothing tells the image size of this {published.layout.title}: "
            f"{published.parts['projection'].path} has no config.model.image_size, and the image "
            f"tower is {width} wide (known: {sizes}). Give --image-size."
        )
    return size


def _read_depth(inventory: Inventory, width: int) -> int:
    """How many blocks the model uses: one less than published, or all that a running model had."""
    last = _list_layers(inventory, r"blocks\.(\d+)\..*")[-1]
    depths = EVA_VIT_DEPTHS.get(width)
    if depths is not None:
        if last + 1 not in depths:
            known = " and ".join(str(number) for number in sorted(depths))
            raise CheckpointError(
                f"{inventory.path} has {last + 1} blocks of a width of {width}; {known} are known. "
                f"{_VISION_REMEDY}"
            )
        return depths[last + 1]
    ran = any(
        is_of_whole_model(each.tensors[0].name)
        for name, each in inventory.recipes.items()
        if name.startswith(f"blocks.{last}.")
    )
    if last < 1 and not ran:
        raise CheckpointError(
            f"{inventory.path} holds a single block, and the last one is never used. "
            f"{_VISION_REMEDY}"
        )
    return last + 1 if ran else last


def _read_qformer(published: Published, vision_width: int) -> QFormerConfig | None:
    """The Q-Former's sizes, or None where the projection reads groups of patches."""
    grouped = PATCHES_PER_ROW * vision_width
    inventory = published.parts.get("qformer")
    if inventory is None:
        _check_width(published, grouped, query_width=None)
        return None
    queries = inventory.shape("query_tokens", remedy=_QFORMER_REMEDY)
    if len(queries) != 3:
        raise CheckpointError(
            f"{inventory.path}: query_tokens is {show_shape(queries)}; 1×queries×C is known. "
            f"{_QFORMER_REMEDY}"
        )
    _check_width(published, grouped, query_width=queries[2])
    return _read_qformer_layers(inventory, published.bert_dir, queries)


def _check_width(published: Published, grouped: int, *, query_width: int | None) -> None:
    """Check that the projection fits the rows of this layout's image side."""
    projection = published.parts["projection"]
    reads = _projection_shape(projection)[1]
    if reads == (query_width or grouped):
        return
    if query_width is None:
        fault = (
            f": it was made for the variant with a Q-Former (without one it would read {grouped})."
            " Add --qformer blip2_pretrained_flant5xxl.pth and --bert with the folder of "
            "bert-base-uncased."
        )
    elif reads == grouped:
        fault = (
            ", four patches side by side: it was made for the variant without a Q-Former. Leave "
            "--qformer and --bert out, or give the projection of the Vicuna variant."
        )
    else:
        fault = (
            f"; the Q-Former gives {query_width} and four patches side by side {grouped}. Give the "
            "projection that was made for these files."
        )
    raise CheckpointError(f"{projection.path} reads rows of a width of {reads}{fault}")


def _read_qformer_layers(
    inventory: Inventory, bert_dir: Path | None, queries: TensorShape
) -> QFormerConfig:
    layer = "Qformer.bert.encoder.layer"
    layers = _list_layers(inventory, rf"{re.escape(layer)}\.(\d+)\..*")
    depth = len(layers)
    if layers != list(range(depth)):
        raise CheckpointError(
            f"{inventory.path}: the numbers of the Q-Former's layers have gaps: there is "
            f"{layer}.{layers[-1]}, but only {depth} layers in all. {_QFORMER_REMEDY}"
        )
    feed_forward = inventory.shape(
        f"{layer}.0.intermediate_query.dense.weight", remedy=_QFORMER_REMEDY
    )
    crossing = [
        index
        for index in range(depth)
        if f"{layer}.{index}.crossattention.self.query.weight" in inventory.recipes
    ]
    frequency = crossing[1] if len(crossing) > 1 else max(depth, 1)
    if crossing != list(range(0, depth, frequency)):
        raise CheckpointError(
            f"{inventory.path} has cross-attention in the layers "
            f"{', '.join(map(str, crossing)) or '(none)'} of {depth}; only every n-th layer from "
            f"layer 0 on is known. {_QFORMER_REMEDY}"
        )
    if bert_dir is None:
        raise CheckpointError(
            "The Q-Former's head count stands in no weight file. Add --bert with the folder of "
            "bert-base-uncased, or at least its config.json."
        )
    sizes = {
        "hidden_size": queries[2],
        "num_hidden_layers": depth,
        "intermediate_size": feed_forward[0],
    }
    heads, eps = _read_bert(bert_dir, sizes, inventory.path)
    try:
        return QFormerConfig(
            **sizes,
            num_attention_heads=heads,
            num_query_tokens=queries[1],
            cross_attention_frequency=frequency,
            layer_norm_eps=eps,
        )
    except ConfigError as error:
        raise CheckpointError(f"{bert_dir / 'config.json'}: {error}") from None


def _read_bert(bert_dir: Path, sizes: dict[str, int], qformer_path: Path) -> tuple[int, float]:
    """Head count and eps, after a check that this is the BERT that the Q-Former was made from."""
    path = bert_dir / "config.json"
    if not path.exists():
        raise CheckpointError(f"{bert_dir} holds no config.json. {_BERT_REMEDY}")
    values, width = read_json(path), sizes["hidden_size"]
    heads, eps = (as_number(values.get(n)) for n in ("num_attention_heads", "layer_norm_eps"))
    eps = 1e-12 if eps is None else eps
    wrong = next((n for n, size in sizes.items() if as_number(values.get(n)) != size), None)
    if wrong is not None:
        seen = f"{wrong} {show_value(values, wrong)}"
        fault = f" says {seen}, but in {qformer_path} it is {sizes[wrong]}"
    elif values.get("hidden_act") not in (None, "gelu"):
        fault = f': hidden_act is {show_value(values, "hidden_act")}; only "gelu" is known'
    elif not isinstance(heads, int) or heads < 1 or width % heads:
        seen = show_value(values, "num_attention_heads")
        fault = f": num_attention_heads is {seen}, which does not divide {width}"
    elif not isinstance(eps, float):
        seen = show_value(values, "layer_norm_eps")
        fault = f": layer_norm_eps is {seen}; a small number is known"
    else:
        return heads, eps
    raise CheckpointError(f"{path}{fault}. {_BERT_REMEDY}")


def _check_projection(
    published: Published, vision: VisionConfig, qformer: QFormerConfig | None
) -> None:
    parts = published.parts
    gives = _projection_shape(parts["projection"])[0]
    language = published.language_folder
    if gives != language.config.hidden_size:
        sizes = {4096: " (a 7B model)", 5120: " (a 13B model)"}
        wide = language.config.hidden_size
        raise CheckpointError(
            f"{parts['projection'].path} was made for a language model of a width of "
            f"{gives}{sizes.get(gives, '')}, but {language.path} is {wide} wide"
            f"{sizes.get(wide, '')}. Give the projection that belongs to this language model, or "
            "the other language model."
        )
    if qformer is not None:
        key = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
        reads = parts["qformer"].shape(key, remedy=_QFORMER_REMEDY)
        if reads[-1] != vision.hidden_size:
            raise CheckpointError(
                f"The Q-Former of {parts['qformer'].path} reads an image tower of a width of "
                f"{reads[-1]}, but {parts['vision'].path} is {vision.hidden_size} wide. Give "
                "files that were published together."
            )


def _projection_shape(inventory: Inventory) -> TensorShape:
    shape = inventory.shape("llama_proj.weight", remedy=_PROJECTION_REMEDY)
    if len(shape) != 2:
        raise CheckpointError(
            f"{inventory.path}: llama_proj.weight is {show_shape(shape)}; a matrix is known. "
            f"{_PROJECTION_REMEDY}"
        )
    return shape


def _list_layers(inventory: Inventory, pattern: str) -> list[int]:
    """The numbers of the layers of which the file holds anything."""
    found = (re.fullmatch(pattern, name) for name in inventory.recipes)
    return sorted({int(match[1]) for match in found if match})
