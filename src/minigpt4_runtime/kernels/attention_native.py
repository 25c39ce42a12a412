"""Causal attention on a CPU: rows that decode by the kernel in C++, prompts as in attention_sdpa.

Owns   nothing. Takes packed rows, the cache and the batch; gives attended rows. Rounds new keys and
       values in one operation a layer, to the numbers of `QuantisedCache.write`.
Never  copies the keys of a sequence that decodes: floats, int8 and int4 are read as they lie there.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import FloatCache, Int4Cache, Int8Cache
from minigpt4_runtime.kernels import native
from minigpt4_runtime.kernels.attention_sdpa import Decode, Singles, attend_with
from minigpt4_runtime.kernels.contracts import KernelLimits, StepBatch
from minigpt4_runtime.model.llama import Attend


class NativeAttention:
    """See `AttentionKernel`."""

    # Without the kernels it takes no cache, and the next one of a device's list is bound.
    limits: ClassVar = KernelLimits(
        formats=(FloatCache, Int8Cache, Int4Cache) if native.find()[0] else ()
    )
    is_capturable: ClassVar = False

    def __init__(self, cache: FloatCache | Int8Cache | Int4Cache) -> None:
        self._cache = cache
        native.require()
        self._operator = torch.ops.minigpt4_kernels.attend_one.default
        self._write = cache.write
        if not isinstance(cache, FloatCache):
            self._write = partial(_write_rounded, cache)

    def __call__(self, batch: StepBatch) -> Attend:
        """See `AttentionKernel`."""
        return attend_with(self._cache, batch, self._decoding, self._write)

    def _decoding(self, singles: Singles) -> Decode:
        lengths, table_rows = singles.lengths.contiguous(), singles.table_rows.contiguous()
        table = singles.block_table.contiguous()

        def decode(layer: int, q: Tensor) -> Tensor:
            attended: Tensor = self._operator(
                q.contiguous(), *self._sides(layer), lengths, table_rows, table, q.shape[2] ** -0.5
            )
            return attended

        return decode

    def _sides(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A layer's keys and values, and the scales of both."""
        cache = self._cache
        if isinstance(cache, FloatCache):
            return cache.keys[layer], cache.values[layer], None, None
        (keys, values), (key_scales, value_scales) = cache.numbers[layer], cache.scales[layer]
        return keys, values, key_scales, value_scales


def _write_rounded(
    cache: Int8Cache | Int4Cache, layer: int, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    centre = None if cache.key_centre is None else cache.key_centre[layer]
    torch.ops.minigpt4_kernels.write_rounded_.default(
        cache.numbers[layer], cache.scales[layer], slots, keys.contiguous(), values.contiguous(),
        centre,
    )  # fmt: skip
