"""The image side as an .om file, on an Ascend NPU, through Ascend's ais_bench.

Owns   the session on one NPU. Takes a graph's path; gives a vision encoder.
Never  runs two batches at once: a session is made for one thread at a time.
"""

import threading
from pathlib import Path

import numpy
import torch

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require
from minigpt4_runtime.vision.graph import Array, GraphVisionEncoder

_INSTALL = "pip install aclruntime-*.whl ais_bench-*.whl, which Ascend publishes with its tools"


def open_graph(
    path: Path,
    batch_sizes: tuple[int, ...] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    provider: str | None = None,
) -> GraphVisionEncoder:
    """Open an .om file on the model's NPU, or on the first one if the model is elsewhere.

    Raises:
        ConfigError: a provider is named: there is none to choose.
        BackendUnavailableError: ais_bench is not installed.
    """
    if provider is not None:
        raise ConfigError(f"provider is {provider!r}; only the runtime onnx has providers.")
    interface = require("ais_bench.infer.interface", install=_INSTALL)
    index = (device.index or 0) if device.type == "npu" else 0
    session = interface.InferSession(index, str(path))
    mode = "static" if batch_sizes is not None and len(batch_sizes) == 1 else "dymbatch"
    lock = threading.Lock()

    def run(pixels: Array) -> Array:
        with lock:
            outputs = session.infer([pixels], mode=mode)
        return numpy.asarray(outputs[0])

    return GraphVisionEncoder(run, batch_sizes, device=device, dtype=dtype)
