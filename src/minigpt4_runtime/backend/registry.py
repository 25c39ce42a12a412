"""Names → devices, kernels and vision runtimes, as tables of "module:attribute".

Owns   which names exist and how a device is chosen.
Takes  what a user typed: auto, cpu, cuda, cuda:1, npu:0.
Never  imports a backend before it is chosen.
"""

import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

from minigpt4_runtime.backend.contracts import AttentionKernel, DeviceBackend, VisionEncoder
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError

# In the order in which "auto" tries them.
DEVICES = {
    "cuda": "minigpt4_runtime.backend.cuda:CudaBackend",
    "npu": "minigpt4_runtime.backend.npu:NpuBackend",
    "cpu": "minigpt4_runtime.backend.cpu:CpuBackend",
}

ATTENTION_KERNELS = {
    "reference": "minigpt4_runtime.backend.attention_reference:prepare",
    "sdpa": "minigpt4_runtime.backend.attention_sdpa:prepare",
    "triton": "minigpt4_runtime.backend.attention_triton:prepare",
    "npu": "minigpt4_runtime.backend.attention_npu:prepare",
}

# torch takes the model's own weights, the others a graph that was made of them.
VISION_RUNTIMES = {
    "torch": "minigpt4_runtime.backend.vision_torch:TorchVisionEncoder",
    "onnx": "minigpt4_runtime.backend.vision_onnx:open_graph",
    "om": "minigpt4_runtime.backend.vision_om:open_graph",
}


def _resolve(target: str) -> Any:
    module_name, attribute = target.split(":")
    return getattr(importlib.import_module(module_name), attribute)


def open_device(name: str) -> DeviceBackend:
    """Open the device a user named, or for "auto" the first kind that this machine has.

    Raises:
        ConfigError: there is no device of that name.
        BackendUnavailableError: it is not on this machine.
    """
    if name == "auto":
        return _first_available()
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name)
    if match is None or match[1] not in DEVICES or (match[1] == "cpu" and match[2]):
        raise ConfigError(
            f"device is {name!r}; it must be auto, cpu, cuda, cuda:INDEX, npu or npu:INDEX."
        )
    index = int(match[2]) if match[2] else None
    return cast(DeviceBackend, _resolve(DEVICES[match[1]])(index))


def _first_available() -> DeviceBackend:
    for target in DEVICES.values():
        try:
            return cast(DeviceBackend, _resolve(target)(None))
        except BackendUnavailableError:
            continue
        except (ImportError, OSError) as error:
            # Its package is there but broken; whoever names this device sees the whole error.
            warnings.warn(f"{target.split(':')[0]} cannot be used ({error}).", stacklevel=3)
    raise AssertionError("the CPU is always available")


def attention_kernel(name: str) -> AttentionKernel:
    """The kernel of that name in ATTENTION_KERNELS."""
    return cast(AttentionKernel, _resolve(ATTENTION_KERNELS[name]))


def vision_encoder(name: str) -> Callable[..., VisionEncoder]:
    """What opens a vision encoder of that name in VISION_RUNTIMES."""
    return cast(Callable[..., VisionEncoder], _resolve(VISION_RUNTIMES[name]))
