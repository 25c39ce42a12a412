"""The image side in ONNX Runtime.

Owns   the choice of an execution provider. Takes a graph's path; gives a vision encoder.
Never  falls back to another provider than the one that was asked for.
"""

from pathlib import Path
from typing import Any

import numpy
import torch

from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.optional import require
from minigpt4_runtime.vision.graph import Array, GraphVisionEncoder

# In the order of preference.
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "cann": "CANNExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_ERRORS_ALONE = 3


def open_graph(
    path: Path,
    batch_sizes: tuple[int, ...] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    provider: str | None = None,
) -> GraphVisionEncoder:
    """Open an ONNX file on `provider`, a name in PROVIDERS, or on the first that is there.

    Raises:
        ConfigError: there is no provider of that name.
        BackendUnavailableError: ONNX Runtime is not installed, or has no such provider.
        CheckpointError: the file is no graph that it can run.
    """
    runtime = require("onnxruntime", extra="onnx")
    name = _choose_provider(provider, runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ALONE
    # As many threads as torch uses, rather than all cores.
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(
            str(path), options, providers=_list_providers(name, device)
        )
    except Exception as error:  # Its errors have no common type.
        raise CheckpointError(
            f"ONNX Runtime cannot open {path} ({error}). Export again."
        ) from error
    if session.get_providers()[0] != name:
        raise BackendUnavailableError(
            f"ONNX Runtime has {name} but cannot start it on this machine: its libraries are "
            "missing or do not fit. Choose another --provider."
        )
    input_name = session.get_inputs()[0].name

    def run(pixels: Array) -> Array:
        return numpy.asarray(session.run(None, {input_name: pixels})[0])

    return GraphVisionEncoder(run, batch_sizes, device=device, dtype=dtype)


def _choose_provider(wanted: str | None, available: list[str]) -> str:
    if wanted is None:
        return next(name for name in PROVIDERS.values() if name in available)
    if wanted not in PROVIDERS:
        raise ConfigError(f"provider is {wanted!r}; it must be one of {', '.join(PROVIDERS)}.")
    if PROVIDERS[wanted] not in available:
        here = [short for short, name in PROVIDERS.items() if name in available]
        raise BackendUnavailableError(
            f"This ONNX Runtime has no provider {wanted}; it has {', '.join(here)}. Install the "
            "build of onnxruntime that brings it, or choose another."
        )
    return PROVIDERS[wanted]


def _list_providers(name: str, device: torch.device) -> list[Any]:
    """The chosen one, on the model's device; and the CPU for operators that it lacks."""
    cpu = PROVIDERS["cpu"]
    index = device.index or 0
    options = {"device_id": str(index)} if name in (PROVIDERS["cuda"], PROVIDERS["cann"]) else {}
    return [cpu] if name == cpu else [(name, options), cpu]
