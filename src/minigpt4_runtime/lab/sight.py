"""The image side as studies need it: from pixels in 0…1, with gradients, left early, looked into.

Owns   the normalising of pixels, the exit at an earlier block, the Q-Former's cross-attention.
Takes  the vision part and pixels; gives rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minigpt4_runtime.config import VisionConfig
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.model.qformer import QFormer, QFormerAttention, QFormerLayer


class Encoded(NamedTuple):
    """(N, R, C) rows, and where each query looked: (L, N, H, queries, patches + 1).

    L are the Q-Former's layers that read the image; the first of the patches is the class row.
    """

    embeddings: Tensor
    cross_attention: Tensor


def normalise(pixels: Tensor, config: VisionConfig) -> Tensor:
    """(N, 3, S, S) in 0…1 → as the tower takes them.

    Raises:
        RequestError: they are no such floats, or have another shape.
    """
    side = config.image_size
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise RequestError(
            f"pixels are {kind}; give a tensor of floats in 0…1, as lab.pixels(picture) does."
        )
    if pixels.dim() != 4 or pixels.shape[1:] != (3, side, side):
        raise RequestError(
            f"pixels are {tuple(pixels.shape)}; this model takes (N, 3, {side}, {side}) in 0…1, "
            "as lab.pixels(picture) gives them."
        )
    mean, std = (
        torch.tensor(numbers, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        for numbers in (config.image_mean, config.image_std)
    )
    return (pixels - mean) / std


@contextmanager
def left_early(vision: VisionPart, exit_layer: int | None) -> Iterator[None]:
    """Let the tower end behind so many of its blocks.

    Raises:
        RequestError: it has not so many.
    """
    blocks = vision.vit.blocks
    if exit_layer is None:
        yield
        return
    if not 0 <= exit_layer <= len(blocks):
        raise RequestError(
            f"exit_layer is {exit_layer}; the tower has {len(blocks)} blocks, so give 0 to "
            f"{len(blocks)}."
        )
    vision.vit.blocks = blocks[:exit_layer]
    try:
        yield
    finally:
        vision.vit.blocks = blocks


@contextmanager
def watching_queries(qformer: QFormer | None) -> Iterator[list[Tensor]]:
    """Gather the (N, H, queries, patches + 1) shares of each layer that reads the image.

    Raises:
        RequestError: there is no Q-Former.
    """
    if qformer is None:
        raise RequestError(
            "This model has no Q-Former: its image rows are neighbouring patches side by side, "
            "row by row of the picture. Leave out cross_attention."
        )
    shares: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        assert isinstance(module, QFormerAttention)
        shares.append(_shares(*given[1:3], module.num_heads))

    readers = [
        layer.cross_attention
        for layer in qformer.layers
        if isinstance(layer, QFormerLayer) and layer.cross_attention is not None
    ]
    handles = [reader.register_forward_pre_hook(look) for reader in readers]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


def _shares(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    q, k = (rows.view(*rows.shape[:2], num_heads, -1).transpose(1, 2) for rows in (q, k))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    shares: Tensor = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return shares
