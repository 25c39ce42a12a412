"""Dense attention that can be seen, changed and differentiated.

Owns   `DenseAttention`, what `Llama` attends with during one pass, and the keys and values of
       sequences that go on.
Takes  queries, keys and values of B sequences of equal length, packed one after the other.
Never  changes a tensor that it was given: a sequence can go on from any earlier place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.lab.hooks import Hooks, Place
from minigpt4_runtime.lab.keep import Kept


@dataclass(frozen=True)
class Past:
    """The keys and values of each layer, each (B, Hkv, T, D)."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def length(self) -> int:
        """How many rows it has."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def select(self, rows: Sequence[int]) -> Past:
        """Of these sequences, in this order, with repeats."""
        index = list(rows)
        return Past(tuple((k[index], v[index]) for k, v in self.layers))

    def first(self, length: int) -> Past:
        """The beginning, in the same memory: it is freed when neither is held any more."""
        return Past(tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.layers))


class DenseAttention:
    """See `Attend`. Made for one pass, which goes on from a past.

    `past` then has the keys and values behind it, where they are wanted: with None there are none.
    """

    def __init__(
        self, past: Past | None, *, num_sequences: int, hooks: Hooks, kept: Kept, branch: str
    ) -> None:
        self._before = past or Past()
        self._goes_on = past is not None
        self._num_sequences = num_sequences
        self._hooks, self._kept, self._branch = hooks, kept, branch
        self._grown: list[tuple[Tensor, Tensor]] = []

    @property
    def past(self) -> Past:
        """Of all layers that have attended, or of none."""
        return Past(tuple(self._grown))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B·Q, H, D), (B·Q, Hkv, D), (B·Q, Hkv, D) → (B·Q, H, D)."""
        q, k, v = (
            x.reshape(self._num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        if self._before.layers:
            before_k, before_v = self._before.layers[layer]
            k, v = torch.cat([before_k, k], 2), torch.cat([before_v, v], 2)
        if self._goes_on:
            self._grown.append((k, v))
        shared = q.shape[1] // k.shape[1]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        start = k.shape[2] - q.shape[2]
        sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(start)
        if self._kept.wants_attention(layer) or self._hooks.at("scores", layer):
            heads = self._attend_seen(layer, (q, k, v), sees)
        elif start == 0:  # Without a mask torch has kernels that never hold all scores.
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        heads = self._hooks.call(heads.transpose(1, 2), Place("heads", layer, start, self._branch))
        return heads.flatten(0, 1)

    def _attend_seen(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], sees: Tensor) -> Tensor:
        """The same with all scores in memory: (B, H, Q, D)."""
        q, k, v = qkv
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        place = Place("scores", layer, k.shape[2] - q.shape[2], self._branch)
        scores = self._hooks.call(scores, place).masked_fill(~sees, float("-inf"))
        wide = torch.promote_types(q.dtype, torch.float32)
        shares = scores.softmax(-1, dtype=wide)
        self._kept.take_attention(layer, shares)
        return shares.to(q.dtype) @ v
