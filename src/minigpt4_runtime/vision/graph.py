"""The image side as a compiled graph, for any runtime.

Owns   the division of images into batches that a graph takes, and the transfer of rows to the
       language model's device and dtype.
Takes  pixels, and a function that runs one batch; gives rows.
Never  knows a runtime.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

Array = numpy.ndarray[Any, Any]


class GraphVisionEncoder:
    """Runs a graph that takes only certain numbers of images at once, or any (None)."""

    def __init__(
        self,
        run: Callable[[Array], Array],
        batch_sizes: tuple[int, ...] | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`run` takes (n, 3, S, S) float32 and gives (n, rows, hidden)."""
        self._run = run
        self._batch_sizes = batch_sizes
        self._device = device
        self._dtype = dtype

    def encode(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:  # noqa: ARG002
        """(N, 3, S, S) float32 → (N, rows, hidden). A graph has no place for `on_tower`."""
        images, rows, first = pixels.float().cpu().numpy(), [], 0
        for size in cut_batches(len(images), self._batch_sizes):
            some = images[first : first + size]
            # A batch that is not full is filled with its first image, whose rows are dropped.
            filled = numpy.concatenate([some, some[:1].repeat(size - len(some), axis=0)])
            rows.append(self._run(filled)[: len(some)])
            first += size
        return torch.from_numpy(numpy.concatenate(rows)).to(self._device, self._dtype)


def cut_batches(num_images: int, batch_sizes: tuple[int, ...] | None) -> Iterator[int]:
    """Sizes of batches that hold all images, the largest first; the last may not be full."""
    if batch_sizes is None:
        yield num_images
        return
    while num_images > 0:
        full = [size for size in batch_sizes if size <= num_images]
        size = max(full) if full else min(batch_sizes)
        yield size
        num_images -= size
