"""The image side in torch.

Owns   the dtype in which the model's vision part computes. Takes pixels; gives rows.
"""

import torch
from torch import Tensor

from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.minigpt4 import VisionPart


class TorchVisionEncoder:
    """Runs the vision part that was loaded with the model."""

    def __init__(self, vision: VisionPart, *, in_float32: bool = False) -> None:
        """`in_float32` computes in float32 whatever the weights are: matrices stay as loaded."""
        self._vision = vision
        self._dtype = torch.float32 if in_float32 else vision.projection.weight.dtype
        matrices = {id(m.weight) for m in vision.modules() if isinstance(m, Linear)}
        for weight in vision.parameters():
            if id(weight) not in matrices:
                weight.data = weight.data.to(self._dtype)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden)."""
        weight = self._vision.projection.weight
        rows: Tensor = self._vision(pixels.to(weight.device, self._dtype))
        return rows.to(weight.dtype)
