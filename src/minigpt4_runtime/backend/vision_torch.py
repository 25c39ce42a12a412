"""The image side in torch.

Owns   nothing but the wish to run the model's vision part. Takes pixels; gives rows.
"""

import torch
from torch import Tensor

from minigpt4_runtime.model.minigpt4 import VisionPart


class TorchVisionEncoder:
    """Runs the vision part that was loaded with the model."""

    def __init__(self, vision: VisionPart) -> None:
        self._vision = vision

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden)."""
        weight = self._vision.projection.weight
        rows: Tensor = self._vision(pixels.to(weight.device, weight.dtype))
        return rows
