"""Causal attention for Ascend: rows that decode by one operator, prompts as in attention_sdpa.

Owns   which caches npu_fused_infer_attention_score takes, and how it is called.
Takes  packed rows, the cache and the batch; gives attended rows.
Never  copies the keys of a sequence that decodes.

It has not run on Ascend hardware: it is written after the operator's description in
Ascend/op-plugin (docs/context) and checked against a stand-in that computes by the reference.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.kernels.attention_sdpa import Decode, Singles, attend_with
from minigpt4_runtime.kernels.contracts import KernelLimits, StepBatch
from minigpt4_runtime.model.llama import Attend
from minigpt4_runtime.optional import require


class NpuAttention:
    """See `AttentionKernel`. On other chips rows that decode attend as prompts do."""

    limits: ClassVar = KernelLimits(
        dtypes=(torch.float16, torch.bfloat16), block_size_step=16, head_dim_step=16
    )
    is_capturable: ClassVar = False

    def __init__(self, cache: FloatCache) -> None:
        self._cache = cache
        torch_npu = require("torch_npu", install="pip install torch_npu")
        chip = torch_npu.npu.get_soc_version()
        is_described = 220 <= chip <= 225 or 250 <= chip <= 255  # Atlas A2 and A3.
        is_narrow = cache.shape.num_heads * cache.shape.head_dim < 2**16
        self._operator = torch_npu.npu_fused_infer_attention_score
        self._decodes = is_described and is_narrow

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        return attend_with(self._cache, batch, self._decoding if self._decodes else None)

    def _decoding(self, singles: Singles) -> Decode:
        num_blocks = -(-singles.longest // self._cache.shape.block_size)
        table = singles.block_table.index_select(0, singles.table_rows)[:, :num_blocks].contiguous()

        def decode(layer: int, q: Tensor) -> Tensor:
            keys, values = self._cache.keys[layer], self._cache.values[layer]
            attended, _ = self._operator(
                q.reshape(len(q), 1, -1),  # BSH: (B, 1, H·D)
                keys.flatten(2),  # (num_blocks, block_size, Hkv·D)
                values.flatten(2),
                input_layout="BSH",
                num_heads=q.shape[1],
                num_key_value_heads=keys.shape[2],
                scale=q.shape[2] ** -0.5,
                block_table=table,
                block_size=keys.shape[1],
                actual_seq_lengths_kv=list(singles.num_tokens),  # On the host.
            )
            return attended.view_as(q)  # type: ignore[no-any-return]

        return decode
