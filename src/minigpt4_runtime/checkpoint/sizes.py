"""What a published model will take, known without its files.

Owns   the sums over a preset's shapes. Takes its name and a dtype; gives bytes.
Never  reads a file.
"""

import math
from functools import cache

from minigpt4_runtime.cache.key_value import token_bytes
from minigpt4_runtime.config import DTYPE_BYTES, DTypeName
from minigpt4_runtime.presets import PRESETS


@cache
def count_parameters(preset: str) -> int:
    """How many numbers a preset's weights are."""
    # Here alone torch is needed: the table of sources and `minigpt4 models` do without.
    from minigpt4_runtime.checkpoint.blank_model import model_shapes

    return sum(math.prod(shape) for shape in model_shapes(PRESETS[preset]).values())


def weight_bytes(preset: str, dtype: DTypeName) -> int:
    """What a preset's weights take, in a model folder as in memory."""
    return count_parameters(preset) * DTYPE_BYTES[dtype]


def running_bytes(preset: str, dtype: DTypeName) -> int:
    """What a preset takes in memory while it answers: weights, and keys and values of one context.

    What a step computes in between comes on top; it is small beside these.
    """
    language = PRESETS[preset].language
    cache_bytes = language.max_position_embeddings * token_bytes(language, dtype)
    return weight_bytes(preset, dtype) + cache_bytes
