"""Ids that a caller gives, as a tensor.

Owns   the check that they are ids of the model.
Takes  whole numbers, in lists or tensors; gives a tensor of them.
Never  knows a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4_runtime.errors import RequestError

Ids = Sequence[int] | Sequence[Sequence[int]] | Tensor


def read_ids(given: Ids, vocab_size: int, device: torch.device) -> Tensor:
    """Ids of one answer, (A,), or of B answers, (B, A), on a device.

    Raises:
        RequestError: they are no such ids, or one is outside the vocabulary.
    """
    try:
        ids = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(())
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    # Of no ids torch cannot know that they are whole numbers.
    if ids.dim() not in (1, 2) or (ids.numel() and not is_whole):
        raise RequestError(
            f"ids are {given!r:.80}; give whole numbers from 0 to {vocab_size - 1}, (A,) or (B, A) "
            "of them."
        )
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise RequestError(
            f"An id is {int(outside[0])}, outside the vocabulary, which is 0 to {vocab_size - 1}. "
            "Give ids of this model, as lab.ids_of does."
        )
    return ids
