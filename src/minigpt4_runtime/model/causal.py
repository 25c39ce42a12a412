"""Dense causal attention over whole sequences, without a cache.

Owns   `causal_attention` and `packed_attention`. Takes how many sequences there are, or how long
       each is; gives what `Llama` attends with.
Never  keeps a key or a value: training, verification and tests compute every token at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.model.llama import Attend


def causal_attention(num_sequences: int = 1) -> Attend:
    """Causal attention for sequences of equal length, packed one after the other."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
        q, k, v = (x.reshape(num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        shared = q.shape[1] // k.shape[1]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).flatten(0, 1)

    return attend


def packed_attention(lengths: Sequence[int]) -> Attend:
    """Causal attention for sequences of these lengths, packed one after the other.

    No sequence sees another: this is a mask of one block for each, computed block by block, so that
    nothing is computed that it hides.
    """
    sizes, one = list(lengths), causal_attention()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = zip(*(torch.split(rows, sizes) for rows in (q, k, v)), strict=True)
        return torch.cat([one(layer, *block) for block in blocks])

    return attend
