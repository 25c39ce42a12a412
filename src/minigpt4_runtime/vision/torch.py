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
        norm = vision.ln_vision.weight
        self._device, self._rows_dtype = norm.device, norm.dtype
        self._dtype = torch.float32 if in_float32 else norm.dtype
        for module in vision.modules():
            matrix = module.part_names if isinstance(module, Linear) else ()
            for name, weight in module.named_parameters(recurse=False):
                if name not in matrix:
                    weight.data = weight.data.to(self._dtype)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden). `on_tower` is called before the projection."""
        features = self._vision.features(pixels.to(self._device, self._dtype))
        if on_tower is not None:
            on_tower()
        rows: Tensor = self._vision.projection(features)
        return rows.to(self._rows_dtype)
