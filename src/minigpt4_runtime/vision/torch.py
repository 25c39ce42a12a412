"""The image side in torch.

Owns   the dtype in which the model's vision part computes, and its graphs where a device has them.
Takes  pixels; gives rows.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from minigpt4_runtime.devices.contracts import Capture, Replay
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.minigpt4 import VisionPart

# A batch that is captured as a graph is filled up to one of these numbers of pictures.
GRAPH_SIZES = (1, 2, 4, 8)

logger = logging.getLogger(__name__)


class TorchVisionEncoder:
    """Runs the vision part that was loaded with the model, by one thread at a time."""

    def __init__(
        self,
        vision: VisionPart,
        *,
        in_float32: bool = False,
        capture: Capture | None = None,
        rows_dtype: torch.dtype | None = None,
    ) -> None:
        """`in_float32` computes in float32 whatever the weights are: matrices stay as loaded.

        `rows_dtype` is that of the rows where another encoder has the same modules and has widened
        them already; without it, they have that of the weights.
        """
        self.part = vision
        self._capture = capture
        self._replays: dict[int, Replay] = {}
        self._pixels: Tensor | None = None  # What graphs read: (8, 3, S, S).
        norm = vision.ln_vision.weight
        self._device, self._rows_dtype = norm.device, rows_dtype or norm.dtype
        self._dtype = torch.float32 if in_float32 else norm.dtype
        for module in vision.modules():
            matrix = module.part_names if isinstance(module, Linear) else ()
            for name, weight in module.named_parameters(recurse=False):
                if name not in matrix:
                    weight.data = weight.data.to(self._dtype)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden). `on_tower` is called before the projection.

        With it, no graph is used.
        """
        if pixels.is_cpu and self._device.type != "cpu":
            # From pinned memory, or the host would wait until the device has done all else.
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        if self._capture is None or on_tower is not None:
            return self._compute(pixels, on_tower)
        parts = pixels.split(GRAPH_SIZES[-1])  # type: ignore[no-untyped-call]
        return torch.cat([self._replay(some) for some in parts])

    def _compute(self, pixels: Tensor, on_tower: Callable[[], object] | None = None) -> Tensor:
        features = self.part.features(pixels.to(self._dtype))
        if on_tower is not None:
            on_tower()
        rows: Tensor = self.part.projection(features)
        return rows.to(self._rows_dtype)

    def _replay(self, pixels: Tensor) -> Tensor:
        """Up to 8 pictures from a graph, which is captured when its size first comes."""
        if self._pixels is None:
            self._pixels = pixels.new_zeros(GRAPH_SIZES[-1], *pixels.shape[1:])
        size = next(each for each in GRAPH_SIZES if each >= len(pixels))
        filled = self._pixels[:size]
        filled[: len(pixels)] = pixels
        if self._capture is not None and size not in self._replays:
            try:
                self._replays[size] = self._capture(lambda: self._compute(filled))
            except RuntimeError as error:
                self._capture = None
                logger.warning(
                    "The image side for %d pictures could not be captured as a graph (%s). "
                    "Pictures go on without graphs, which is slower.",
                    size, str(error).partition("\n")[0],
                )  # fmt: skip
        if size in self._replays:
            return self._replays[size]()[: len(pixels)].clone()
        return self._compute(pixels)
