"""The image side in torch.

Owns   the dtype in which the model's vision part computes. Takes pixels; gives rows.
"""

from collections.abc import Callable

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
    def encode(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden). `on_tower` is called before the projection."""
        weight = self._vision.projection.weight
        features = self._vision.features(pixels.to(weight.device, self._dtype))
        if on_tower is not None:
            on_tower()
        rows: Tensor = self._vision.projection(features)
        return rows.to(weight.dtype)
