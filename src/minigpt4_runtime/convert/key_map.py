"""What the published files call each weight, and what we call it.

Owns   the renaming tables, the few weights that are made of others, and the names left unused.
Takes  a config; gives for each of our names the published names it comes from, and how.
Never  opens a file.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4_runtime.config import LanguageConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.model.eva_vit import resize_positions

Make = Callable[[Sequence[Tensor]], Tensor]


def _as_it_is(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _without_batch(tensors: Sequence[Tensor]) -> Tensor:
    """(1, …) → (…): upstream keeps a batch of one in learned rows."""
    (tensor,) = tensors
    return tensor.squeeze(0)


@dataclass(frozen=True)
class Origin:
    """Which published tensors one of our weights is made of, and how."""

    names: tuple[str, ...]
    make: Make = _as_it_is


OriginMap = dict[str, Origin]

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
LN_VISION = (r"ln_vision\.(weight|bias)",)

# --- what the published files hold and the model does not use --------------------------------

UNUSED_LANGUAGE = (r".*\.rotary_emb\.inv_freq",)
UNUSED_VISION = (r"(head|norm|fc_norm)\..*",)
UNUSED_QFORMER = (
    r"Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"Qformer\.cls\..*",
    r"(t5|llm|opt)_proj\..*",
)
# Upstream saves a fine-tune's projection together with these buffers.
UNUSED_PROJECTION = (*UNUSED_LANGUAGE, *UNUSED_QFORMER[:3])

# EVA-ViT-g is published with one block more than the model uses; saved while a model ran, it has
# those that are used. By its width: blocks in the file → blocks of the model.
EVA_VIT_DEPTHS = {1408: {40: 39, 39: 39}}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a whole published name fits one of the patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def language_origins(config: LanguageConfig, *, is_tied: bool) -> OriginMap:
    """Where the language model's weights come from. A tied head is the embedding table."""
    embedding = "model.embed_tokens.weight"
    origins = {"language.token_embedding.weight": Origin((embedding,))}
    for layer in range(config.num_hidden_layers):
        for published, ours in _LANGUAGE_LAYER.items():
            origins[f"language.layers.{layer}.{ours}.weight"] = Origin(
                (f"model.layers.{layer}.{published}.weight",)
            )
    origins["language.norm.weight"] = Origin(("model.norm.weight",))
    origins["language.head.weight"] = Origin((embedding if is_tied else "lm_head.weight",))
    return origins


def vision_origins(config: VisionConfig) -> OriginMap:
    """Where the image tower's weights come from."""
    origins = _renamed("patch_embed.proj", "vision.vit.patch_embedding")
    origins["vision.vit.patch_embedding.weight"] = Origin(
        ("patch_embed.proj.weight",), lambda t: t[0].flatten(1)
    )
    origins["vision.vit.class_embedding"] = Origin(("cls_token",), lambda t: t[0].flatten())
    origins["vision.vit.position_embedding"] = Origin(
        ("pos_embed",), lambda t: _fit_positions(t, config.num_patches)
    )
    for block in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{block}", f"vision.vit.blocks.{block}"
        for published, name in _VISION_BLOCK.items():
            origins |= _renamed(f"{theirs}.{published}", f"{ours}.{name}")
        origins[f"{ours}.attention.qkv.weight"] = Origin((f"{theirs}.attn.qkv.weight",))
        origins[f"{ours}.attention.qkv.bias"] = Origin(
            (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias"), _join_biases
        )
    return origins


def _join_biases(tensors: Sequence[Tensor]) -> Tensor:
    """EVA-ViT's keys have no bias: theirs is zero."""
    query, value = tensors
    return torch.cat([query, torch.zeros_like(query), value])


def _fit_positions(tensors: Sequence[Tensor], num_patches: int) -> Tensor:
    table = _without_batch(tensors)
    is_stretched = len(table) != num_patches + 1
    # Upstream stretches in float32, whatever the file's dtype is.
    return resize_positions(table.float() if is_stretched else table, num_patches)


def qformer_origins(config: QFormerConfig) -> OriginMap:
    """Where the Q-Former's weights come from."""
    origins = _renamed("Qformer.bert.embeddings.LayerNorm", "vision.qformer.query_norm")
    origins["vision.qformer.query_tokens"] = Origin(("query_tokens",), _without_batch)
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"Qformer.bert.encoder.layer.{layer}", f"vision.qformer.layers.{layer}"
        attentions = {"attention": "attention"}
        if layer % config.cross_attention_frequency == 0:
            attentions["crossattention"] = "cross_attention"
        for block, our_block in attentions.items():
            for published, name in _QFORMER_ATTENTION.items():
                origins |= _renamed(f"{theirs}.{block}.{published}", f"{ours}.{our_block}.{name}")
        for published, name in _QFORMER_FEED_FORWARD.items():
            origins |= _renamed(f"{theirs}.{published}", f"{ours}.{name}")
    return origins


def ln_vision_origins() -> OriginMap:
    """Where the norm after the image tower comes from, when a file has it."""
    return _renamed("ln_vision", "vision.ln_vision")


def untrained_ln_vision(width: int) -> OriginMap:
    """The norm after the image tower as torch makes it: the Llama-2 variant never loads one."""
    return {
        "vision.ln_vision.weight": Origin((), lambda _: torch.ones(width, dtype=torch.float32)),
        "vision.ln_vision.bias": Origin((), lambda _: torch.zeros(width, dtype=torch.float32)),
    }


def projection_origins() -> OriginMap:
    """Where the projection comes from."""
    return _renamed("llama_proj", "vision.projection")


def _renamed(published: str, ours: str) -> OriginMap:
    return {f"{ours}.{part}": Origin((f"{published}.{part}",)) for part in ("weight", "bias")}
