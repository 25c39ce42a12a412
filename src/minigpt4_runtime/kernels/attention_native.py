"""Causal attention on a CPU: rows that decode by the kernel in C++, prompts as in attention_sdpa.

Owns   nothing. Takes packed rows, the cache and the batch; gives attended rows.
Never  copies the keys of a sequence that decodes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.kernels import native
from minigpt4_runtime.kernels.attention_sdpa import Decode, Singles, attend_with
from minigpt4_runtime.kernels.contracts import KernelLimits, StepBatch
from minigpt4_runtime.model.llama import Attend


class NativeAttention:
    """See `AttentionKernel`."""

    # Without the kernels it takes no cache, and the next one of a device's list is bound.
    limits: ClassVar = KernelLimits() if native.find()[0] else KernelLimits(formats=())

    def __init__(self, cache: FloatCache) -> None:
        self._cache = cache
        native.require()
        self._operator = torch.ops.minigpt4_kernels.attend_one.default

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        return attend_with(self._cache, batch, self._decoding)

    def _decoding(self, singles: Singles) -> Decode:
        lengths, table_rows = singles.lengths.contiguous(), singles.table_rows.contiguous()
        table = singles.block_table.contiguous()

        def decode(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            scale = q.shape[2] ** -0.5
            operator = self._operator
            attended: Tensor = operator(
                q.contiguous(), keys, values, lengths, table_rows, table, scale
            )
            return attended

        return decode
