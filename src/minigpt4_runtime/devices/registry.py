"""Names → devices, as a table of "module:attribute".

Owns   which names exist and how a device is chosen.
Takes  a user's choice: auto, cpu, cuda, cuda:1, npu:0.
Never  imports a backend before it is chosen.
"""

import re
import warnings
from pkgutil import resolve_name
from typing import cast

from minigpt4_runtime.devices.contracts import DeviceBackend
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError

# In the order in which "auto" tries them.
DEVICES = {
    "cuda": "minigpt4_runtime.devices.cuda:CudaBackend",
    "npu": "minigpt4_runtime.devices.npu:NpuBackend",
    "cpu": "minigpt4_runtime.devices.cpu:CpuBackend",
}


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
    return cast(DeviceBackend, resolve_name(DEVICES[match[1]])(index))


def _first_available() -> DeviceBackend:
    for target in DEVICES.values():
        try:
            return cast(DeviceBackend, resolve_name(target)(None))
        except BackendUnavailableError:
            continue
        except (ImportError, OSError) as error:
            # Its package is broken. The whole error shows if a user names this device.
            warnings.warn(f"{target.split(':')[0]} cannot be used ({error}).", stacklevel=3)
    raise AssertionError("the CPU is always available")
