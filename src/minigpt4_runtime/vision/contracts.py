"""The contract of an image encoder, for any runtime."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class VisionEncoder(Protocol):
    """The image side as one graph: ViT, ln_vision, Q-Former or grouping, projection."""

    def encode(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden), on the language model's device and dtype.

        `on_tower` is called between tower and projection; a compiled graph has no such place.
        """
