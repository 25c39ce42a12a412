"""The bytes that keys and values take, known without torch.

Owns   the arithmetic of each format. Takes a LanguageConfig, or the width of a head; gives bytes.
"""

import math

from minigpt4_runtime.config import DTYPE_BYTES, CacheDTypeName, LanguageConfig


def int4_group(head_dim: int) -> int:
    """How many numbers of a head share a step in int4: 8, or what divides half of one too."""
    return math.gcd(head_dim // 2, 8)


def head_bytes(head_dim: int, dtype: CacheDTypeName) -> int:
    """The size of one key, or one value, of one head."""
    if dtype == "int4":
        # Half a byte a number; two float16, and two bytes for each group.
        return head_dim // 2 + 4 + head_dim // int4_group(head_dim) * 2
    if dtype == "int8" or dtype == "fp8":
        return head_dim + 4  # With a float32 scale.
    return head_dim * DTYPE_BYTES[dtype]


def token_bytes(config: LanguageConfig, dtype: CacheDTypeName) -> int:
    """The size of one token's keys and values in all layers, on all ranks together."""
    num_heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * num_heads * head_bytes(config.head_dim, dtype)
