"""Causal attention for Ascend: rows that decode by one operator, prompts as in attention_sdpa.

Owns   which caches npu_fused_infer_attention_score takes, and how it is called.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies the keys of a sequence that decodes.

It has not run on Ascend hardware: it is written after the operator's description in
Ascend/op-plugin (docs/context) and checked against a stand-in that computes by the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.kernels.attention_sdpa import Decode, block_table, prepare_with
from minigpt4_runtime.kernels.contracts import BatchLayout, SequenceSlice
from minigpt4_runtime.model.llama import Attend
from minigpt4_runtime.optional import require


def prepare(cache: KeyValueCache, batch: BatchLayout) -> Attend:
    """See `AttentionKernel`."""
    return prepare_with(cache, batch, _decoding if _takes(_torch_npu(), cache) else None)


def _torch_npu() -> ModuleType:
    return require("torch_npu", install="pip install torch_npu")


def _takes(torch_npu: ModuleType, cache: KeyValueCache) -> bool:
    """Whether the operator is described for this chip and such a cache."""
    _, _, block_size, num_kv_heads, head_dim = cache.keys.shape
    chip = torch_npu.npu.get_soc_version()
    return (
        (220 <= chip <= 225 or 250 <= chip <= 255)  # Atlas A2 and A3.
        and cache.keys.dtype in (torch.float16, torch.bfloat16)
        and block_size % 16 == 0
        and head_dim % 16 == 0
        and num_kv_heads * head_dim < 2**16
    )


def _decoding(cache: KeyValueCache, sequences: Sequence[SequenceSlice]) -> Decode:
    operator = _torch_npu().npu_fused_infer_attention_score
    table = block_table(sequences, cache.keys.device)
    lengths = [each.num_tokens for each in sequences]  # The operator wants these on the host.

    def decode(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended, _ = operator(
            q.reshape(len(q), 1, -1),  # BSH: (B, 1, H·D)
            keys.flatten(2),  # (num_blocks, block_size, Hkv·D)
            values.flatten(2),
            input_layout="BSH",
            num_heads=q.shape[1],
            num_key_value_heads=keys.shape[2],
            scale=q.shape[2] ** -0.5,
            block_table=table,
            block_size=keys.shape[1],
            actual_seq_lengths_kv=lengths,
        )
        return attended.view_as(q)  # type: ignore[no-any-return]

    return decode
