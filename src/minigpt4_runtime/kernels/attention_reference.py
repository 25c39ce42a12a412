"""Causal attention in plain torch: slow, simple, and the definition of correct.

Owns   nothing. Takes packed rows, the cache and the batch; gives attended rows.
Every other kernel is held to this one by a test.
"""

from typing import ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.kernels.contracts import KernelLimits, StepBatch
from minigpt4_runtime.model.llama import Attend


class ReferenceAttention:
    """See `AttentionKernel`. It knows a cache by `write` and `read` alone, whatever its format."""

    limits: ClassVar = KernelLimits(formats=(object,))
    is_capturable: ClassVar = False

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        cache = self._cache

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, batch.slots, k, v)
            attended = torch.empty_like(q)
            for sequence in batch.sequences:
                rows = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
                keys, values = cache.read(layer, batch.slots_of(sequence, cache.shape.block_size))
                attended[rows] = _attend_one(q[rows], keys.to(q.dtype), values.to(q.dtype))
            return attended

        return attend


def _attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(R, H, D) queries at the end of (S, Hkv, D) keys and values → (R, H, D)."""
    num_rows, num_heads, head_dim = q.shape
    num_tokens, num_kv_heads, _ = keys.shape
    # Query heads that share a key/value head stand side by side: (Hkv, H/Hkv · R, D).
    grouped = q.view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(num_kv_heads, -1, head_dim)
    scores = (grouped @ keys.permute(1, 2, 0)).float() * head_dim**-0.5
    scores = scores.view(num_kv_heads, num_heads // num_kv_heads, num_rows, num_tokens)
    future = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=q.device)
    future = future.triu(diagonal=num_tokens - num_rows + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)
    mixed: Tensor = weights.view(num_kv_heads, -1, num_tokens) @ values.transpose(0, 1)
    return mixed.view(num_heads, num_rows, head_dim).transpose(0, 1)
