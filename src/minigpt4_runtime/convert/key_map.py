"""The published name of each weight, and ours.

Owns   the renaming tables, the few weights made of several, and the names that are not used.
Takes  a config; gives for each of our names its published names, and a function that joins them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigpt4_runtime.config import LanguageConfig, ModelConfig
from minigpt4_runtime.convert.recipe import Make, as_it_is
from minigpt4_runtime.model.eva_vit import resize_positions


@dataclass(frozen=True)
class Origin:
    """The published weights that one of ours is made of, and the function that joins them."""

    names: tuple[str, ...]
    make: Make = as_it_is


OriginMap = dict[str, Origin]


@dataclass(frozen=True)
class PartMap:
    """The weights of one part of a published model. `unused` are patterns of names to drop.

    `untrained` replaces some of the origins where the files hold none of these weights.
    """

    origins: OriginMap
    unused: tuple[str, ...] = ()
    untrained: OriginMap = field(default_factory=dict)


# --- the language model: published name of a part → ours -------------------------------------

_LANGUAGE_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}

_PUBLISHED_NAME = {ours: published for published, ours in _LANGUAGE_LAYER.items()}

# --- EVA-ViT ---------------------------------------------------------------------------------

_VISION_BLOCK = {
    "norm1": "attention_norm",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}

# --- the Q-Former ----------------------------------------------------------------------------

_QFORMER_ATTENTION = {
    "self.query": "query",
    "self.key": "key",
    "self.value": "value",
    "output.dense": "out",
    "output.LayerNorm": "norm",
}
_QFORMER_FEED_FORWARD = {
    "intermediate_query.dense": "mlp_in",
    "output_query.dense": "mlp_out",
    "output_query.LayerNorm": "mlp_norm",
}

# --- which part of the model a published name belongs to --------------------------------------

PARTS = {
    "language": (r"(model|lm_head)\..*",),
    "vision": (r"cls_token|pos_embed", r"(patch_embed|blocks|head|norm|fc_norm)\..*"),
    "qformer": (r"query_tokens", r"(Qformer|ln_vision|t5_proj|llm_proj|opt_proj)\..*"),
    "projection": (r"llama_proj\..*",),
}

# --- names in the published files that the model does not use --------------------------------

UNUSED_LANGUAGE = (r".*\.rotary_emb\.inv_freq",)
_UNUSED_QFORMER = (
    r"Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"Qformer\.cls\..*",
)
# Upstream saves a fine-tune's projection together with these buffers.
_UNUSED_PROJECTION = (*UNUSED_LANGUAGE, *_UNUSED_QFORMER)

# What a running model with LoRA puts before the names of its language model: the attribute's name,
# and what PEFT adds (upstream: base_model.py, init_llm).
LANGUAGE_PREFIX = "llama_model.base_model.model."

# EVA-ViT-g is published with one block more than the model uses. Saved from a running model, it has
# only the used ones. By its width: blocks in the file → blocks of the model.
EVA_VIT_DEPTHS = {1408: {40: 39, 39: 39}}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a whole published name fits one of the patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def own_name(published: str) -> str | None:
    """Our name of a layer's part, without "language."; None for other parts of the model."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", published)
    ours = _LANGUAGE_LAYER.get(found[2]) if found else None
    return f"layers.{found[1]}.{ours}" if found and ours else None


def language_origins(config: LanguageConfig) -> OriginMap:
    """Where the language model's weights come from."""
    origins = {"language.token_embedding.weight": Origin(("model.embed_tokens.weight",))}
    for layer in range(config.num_hidden_layers):
        for published, ours in _LANGUAGE_LAYER.items():
            origins[f"language.layers.{layer}.{ours}.weight"] = Origin(
                (f"model.layers.{layer}.{published}.weight",)
            )
    for ours, _ in config.adapters.ranks if config.adapters else ():
        _, layer_number, name = ours.split(".", 2)
        theirs = f"model.layers.{layer_number}.{_PUBLISHED_NAME[name]}"
        origins[f"language.{ours}.adapter.low"] = Origin((f"{theirs}.lora_A.weight",))
        origins[f"language.{ours}.adapter.high"] = Origin((f"{theirs}.lora_B.weight",))
    origins["language.norm.weight"] = Origin(("model.norm.weight",))
    origins["language.head.weight"] = Origin(("lm_head.weight",))
    return origins


def language_map(config: ModelConfig) -> PartMap:
    """The language model."""
    return PartMap(language_origins(config.language), UNUSED_LANGUAGE)


def vision_map(config: ModelConfig) -> PartMap:
    """The image tower."""
    num_blocks, num_patches = config.vision.num_hidden_layers, config.vision.num_patches
    origins = _renamed("patch_embed.proj", "vision.vit.patch_embedding")
    origins["vision.vit.patch_embedding.weight"] = Origin(
        ("patch_embed.proj.weight",), lambda t: t[0].flatten(1)
    )
    origins["vision.vit.class_embedding"] = Origin(("cls_token",), lambda t: t[0].flatten())
    origins["vision.vit.position_embedding"] = Origin(
        ("pos_embed",), lambda t: _fit_positions(t[0].squeeze(0), num_patches)
    )
    for block in range(num_blocks):
        theirs, ours = f"blocks.{block}", f"vision.vit.blocks.{block}"
        for published, name in _VISION_BLOCK.items():
            origins |= _renamed(f"{theirs}.{published}", f"{ours}.{name}")
        origins[f"{ours}.attention.qkv.weight"] = Origin((f"{theirs}.attn.qkv.weight",))
        origins[f"{ours}.attention.qkv.bias"] = Origin(
            (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias"), _join_biases
        )
    # The second pattern is the published block that the model does not use.
    return PartMap(origins, (r"(head|norm|fc_norm)\..*", rf"blocks\.{num_blocks}\..*"))


def _join_biases(tensors: Sequence[Tensor]) -> Tensor:
    """EVA-ViT's keys have no bias: theirs is zero."""
    query, value = tensors
    dtype = torch.promote_types(query.dtype, value.dtype)
    # On the meta device torch.cat and zeros_like would load torch's compiler, which takes seconds.
    joined = query.new_zeros(2 * query.numel() + value.numel(), dtype=dtype)
    joined[: query.numel()] = query
    joined[-value.numel() :] = value
    return joined


def _fit_positions(table: Tensor, num_patches: int) -> Tensor:
    is_stretched = len(table) != num_patches + 1
    # Upstream stretches in float32, whatever the file's dtype is.
    return resize_positions(table.float() if is_stretched else table, num_patches)


def qformer_map(config: ModelConfig) -> PartMap:
    """BLIP-2's Q-Former, and the norm before it, from one file."""
    assert config.qformer is not None
    origins = _LN_VISION | _renamed(
        "Qformer.bert.embeddings.LayerNorm", "vision.qformer.query_norm"
    )
    # (1, Q, C) → (Q, C)
    origins["vision.qformer.query_tokens"] = Origin(("query_tokens",), lambda t: t[0].squeeze(0))
    for layer in range(config.qformer.num_hidden_layers):
        theirs, ours = f"Qformer.bert.encoder.layer.{layer}", f"vision.qformer.layers.{layer}"
        attentions = {"attention": "attention"}
        if layer % config.qformer.cross_attention_frequency == 0:
            attentions["crossattention"] = "cross_attention"
        for block, our_block in attentions.items():
            for published, name in _QFORMER_ATTENTION.items():
                origins |= _renamed(f"{theirs}.{block}.{published}", f"{ours}.{our_block}.{name}")
        for published, name in _QFORMER_FEED_FORWARD.items():
            origins |= _renamed(f"{theirs}.{published}", f"{ours}.{name}")
    return PartMap(origins, (*_UNUSED_QFORMER, r"(t5|llm|opt)_proj\..*"))


def projection_map(_: ModelConfig) -> PartMap:
    """The projection behind a Q-Former."""
    return PartMap(_PROJECTION, _UNUSED_PROJECTION)


def grouped_projection_map(config: ModelConfig) -> PartMap:
    """The projection of grouped patches. Upstream never loads the norm before it; a file may."""
    width = config.vision.hidden_size
    untrained = {
        "vision.ln_vision.weight": Origin((), lambda _: torch.ones(width, dtype=torch.float32)),
        "vision.ln_vision.bias": Origin((), lambda _: torch.zeros(width, dtype=torch.float32)),
    }
    return PartMap(_LN_VISION | _PROJECTION, _UNUSED_PROJECTION, untrained)


def trained_origins(config: ModelConfig) -> OriginMap:
    """What a training can change, and an adapter has: projection, Q-Former, and LoRA if there is.

    Each has one origin, whose name in a training's file begins with `LANGUAGE_PREFIX` for LoRA.
    """
    qformer = qformer_map(config).origins if config.qformer is not None else {}
    return {
        **_PROJECTION,
        **{name: each for name, each in qformer.items() if name.startswith("vision.qformer.")},
        **{
            name: each
            for name, each in language_origins(config.language).items()
            if ".adapter." in name
        },
    }


def _renamed(published: str, ours: str) -> OriginMap:
    return {f"{ours}.{part}": Origin((f"{published}.{part}",)) for part in ("weight", "bias")}


_LN_VISION = _renamed("ln_vision", "vision.ln_vision")
_PROJECTION = _renamed("llama_proj", "vision.projection")
