"""The published models' sizes, known without their files: what will they take?

Owns   the configs of the published models, and the sums over their shapes.
Takes  a preset's name and a dtype; gives bytes.
Never  decides what a model is: a conversion reads that from the files' own shapes.
"""

import math
from dataclasses import replace
from functools import cache

from minigpt4_runtime.checkpoint.weights import DTYPE_CODES, ITEM_BYTES
from minigpt4_runtime.config import (
    DTypeName,
    LanguageConfig,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
)

_EVA_VIT_G = VisionConfig(
    image_size=224,
    patch_size=14,
    hidden_size=1408,
    num_hidden_layers=39,
    num_attention_heads=16,
    intermediate_size=6144,
)
_QFORMER = QFormerConfig(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    num_query_tokens=32,
)
_LLAMA_7B = LanguageConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
_LLAMA_13B = replace(
    _LLAMA_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
_LLAMA_2_7B = replace(_LLAMA_7B, max_position_embeddings=4096, rms_norm_eps=1e-5)

PRESETS = {
    "vicuna-7b": ModelConfig(
        vision=_EVA_VIT_G, qformer=_QFORMER, language=_LLAMA_7B, template="vicuna"
    ),
    "vicuna-13b": ModelConfig(
        vision=_EVA_VIT_G, qformer=_QFORMER, language=_LLAMA_13B, template="vicuna"
    ),
    "llama2-7b": ModelConfig(
        vision=_EVA_VIT_G, qformer=None, language=_LLAMA_2_7B, template="llama2"
    ),
}


def item_bytes(dtype: DTypeName) -> int:
    """What one number of a dtype takes."""
    return ITEM_BYTES[DTYPE_CODES[dtype]]


@cache
def count_parameters(preset: str) -> int:
    """How many numbers a preset's weights are."""
    # Here alone torch is needed: the table of sources and `minigpt4 models` do without.
    from minigpt4_runtime.checkpoint.blank_model import model_shapes

    return sum(math.prod(shape) for shape in model_shapes(PRESETS[preset]).values())


def weight_bytes(preset: str, dtype: DTypeName) -> int:
    """What a preset's weights take, in a model folder as in memory."""
    return count_parameters(preset) * item_bytes(dtype)


def running_bytes(preset: str, dtype: DTypeName) -> int:
    """What a preset takes in memory while it answers: weights, and keys and values of one context.

    What a step computes in between comes on top; it is small beside these.
    """
    language = PRESETS[preset].language
    per_token = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
    cache_bytes = per_token * language.max_position_embeddings * item_bytes(dtype)
    return weight_bytes(preset, dtype) + cache_bytes
