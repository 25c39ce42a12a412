"""Causal attention in plain torch: slow, simple, and the definition of correct.

Owns   nothing. Takes packed rows, one layer's cache and the batch; gives attended rows.
Every other kernel is held to this one by a test.
"""

import torch
from torch import Tensor

from minigpt4_runtime.backend.contracts import BatchLayout, KeyValueCache


def attend(q: Tensor, k: Tensor, v: Tensor, *, cache: KeyValueCache, batch: BatchLayout) -> Tensor:
    """Write k and v into the cache and attend: (T, H, D), 2 × (T, Hkv, D) → (T, H, D)."""
    attended = torch.empty_like(q)
    for sequence in batch.sequences:
        rows = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
        own_slots = sequence.slots[-sequence.num_rows :]
        cache.keys[own_slots] = k[rows]
        cache.values[own_slots] = v[rows]
        keys, values = cache.keys[sequence.slots], cache.values[sequence.slots]
        attended[rows] = _attend_one(q[rows], keys, values)
    return attended


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
