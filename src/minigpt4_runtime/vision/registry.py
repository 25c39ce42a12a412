"""Names → runtimes of the image side, as a table of "module:attribute".

Owns   which names exist. Never imports a runtime before it is chosen.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import cast

from minigpt4_runtime.vision.contracts import VisionEncoder

# torch runs the model's own weights, the others a graph that was exported from them.
VISION_RUNTIMES = {
    "torch": "minigpt4_runtime.vision.torch:TorchVisionEncoder",
    "onnx": "minigpt4_runtime.vision.onnx:open_graph",
    "om": "minigpt4_runtime.vision.om:open_graph",
}


def vision_encoder(name: str) -> Callable[..., VisionEncoder]:
    """The class or function that opens a vision encoder of that name in VISION_RUNTIMES."""
    return cast(Callable[..., VisionEncoder], resolve_name(VISION_RUNTIMES[name]))
