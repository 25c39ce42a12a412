"""The shapes of the published models, known without their files.

Owns   the numbers; each stands in the published files' own configs.
Takes  nothing: a preset's name is a key of PRESETS.
Never  decides the shape of a model: a conversion reads it from the files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig

_EVA_VIT_G = VisionConfig(
    image_size=224, patch_size=14, hidden_size=1408, num_hidden_layers=39, num_attention_heads=16,
    intermediate_size=6144,
)  # fmt: skip
_QFORMER = QFormerConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    num_query_tokens=32,
)  # fmt: skip


def _llama(size: int, intermediate: int, num_layers: int, **others: Any) -> LanguageConfig:
    heads = size // 128
    return LanguageConfig(
        hidden_size=size, intermediate_size=intermediate, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=heads, **others,
    )  # fmt: skip


def _vicuna(size: int, intermediate: int, num_layers: int) -> ModelConfig:
    # Vicuna v0 has one id more than Llama, for padding.
    others = {"vocab_size": 32001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    language = _llama(size, intermediate, num_layers, **others)
    return ModelConfig(vision=_EVA_VIT_G, qformer=_QFORMER, language=language, template="vicuna")


_LLAMA2_7B = _llama(
    4096, 11008, 32, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5
)

PRESETS = {
    "vicuna-7b": _vicuna(4096, 11008, 32),
    "vicuna-13b": _vicuna(5120, 13824, 40),
    "llama2-7b": ModelConfig(
        vision=_EVA_VIT_G, qformer=None, language=_LLAMA2_7B, template="llama2"
    ),
    "minigpt-v2": ModelConfig(
        vision=replace(_EVA_VIT_G, image_size=448),
        qformer=None,
        language=_LLAMA2_7B,
        template="minigptv2",
    ),
}
