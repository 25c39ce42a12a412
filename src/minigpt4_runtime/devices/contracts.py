"""The contracts of a device and of a group of ranks, as the engine sees them.

Owns   the protocols and their frozen values.
Takes  nothing: there is no code here that computes.
Never  names a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.model.parallel import Group


@dataclass(frozen=True)
class DeviceFacts:
    """The properties of a kind of device, in place of `if device == "cuda"`.

    `cache_share` is the part of the memory left free by the weights that keys and values may take.
    With `shares_memory`, all ranks on a machine share one memory.
    """

    default_dtype: DTypeName
    attention: tuple[str, ...]  # In kernels.registry.ATTENTION_KERNELS; the best one first.
    cache_share: float
    collective: str  # torch.distributed's name of the library that sums over such devices.
    shares_memory: bool = False
    joins: bool = True  # Weights that multiply the same rows become one; else they stay in a file.
    has_float8: bool = False  # Keys and values may be kept in 8-bit floats.
    has_float64: bool = True  # Sorting and sums of it too; else the CPU draws tokens.
    captures_sums: bool = False  # A captured graph may sum over ranks.
    runs_ahead: bool = False  # It works while the host goes on, so a step may wait in its queue.


# Does again what was captured, with the same tensors, and gives the same tensor, filled anew.
Replay = Callable[[], Tensor]
# Runs a function once to warm it up, then records what it gives the device to do.
Capture = Callable[[Callable[[], Tensor]], Replay]


class DeviceBackend(Protocol):
    """One device of this machine."""

    facts: DeviceFacts
    device: torch.device

    def __init__(self, index: int | None) -> None:
        """Open device `index`, or the first one. BackendUnavailableError if there is none."""

    def free_memory_bytes(self) -> int | None:
        """The memory that a model may take, or None if it is not known."""

    def widen_from(self, dtype: torch.dtype) -> int | None:
        """From how many rows on a weight of `dtype` is best widened to float32 for a product.

        None: never.
        """

    @property
    def capture(self) -> Capture | None:
        """How work is recorded as a graph that is launched at once; None: not on this device.

        A RuntimeError says that a function could not be recorded.
        """

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that a clock may be read."""

    def reset_peak_memory(self) -> None:
        """Forget how much memory was taken so far."""

    def peak_memory_bytes(self) -> int | None:
        """The most memory in use at once since then, or None if it is not known.

        Of tensors on an accelerator, of the whole process on a CPU.
        """


@dataclass(frozen=True)
class Traffic:
    """The collectives of this rank: their bytes, and the time it has waited for them.

    On a GPU the device waits, and `seconds` is only the time of the calls.
    """

    num_calls: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class ParallelGroup(Group, Protocol):
    """Ranks that also pass messages and numbers, from the leader to all others."""

    traffic: Traffic

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""

    def spread(self, numbers: Tensor) -> Tensor:
        """The leader's numbers to all, in place; as rows go: the host waits on no accelerator."""

    def send(self, message: bytes) -> None:
        """Send a message to all others. For the leader."""

    def receive(self) -> bytes:
        """Wait for the leader's next message, without a limit."""
