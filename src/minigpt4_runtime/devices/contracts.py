"""What a device and a group of ranks must offer; the part that the engine sees.

Owns   the protocols and the frozen values that pass through them.
Takes  nothing: there is no code here that computes.
Never  names a device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.model.parallel import Group


@dataclass(frozen=True)
class DeviceFacts:
    """What is true of a kind of device: these replace `if device == "cuda"`.

    `cache_share` is the part of the memory left free by the weights that keys and values may take.
    Where `shares_memory`, all ranks on a machine take theirs from one memory.
    """

    default_dtype: DTypeName
    attention: tuple[str, ...]  # In kernels.registry.ATTENTION_KERNELS; the best one first.
    cache_share: float
    collective: str  # What torch.distributed calls the library that adds up over such devices.
    shares_memory: bool = False


class DeviceBackend(Protocol):
    """One device of this machine."""

    facts: DeviceFacts
    device: torch.device

    def __init__(self, index: int | None) -> None:
        """Open device `index`, or the first one. BackendUnavailableError if there is none."""
        ...

    def free_memory_bytes(self) -> int | None:
        """How much a model may take, or None where this cannot be known."""
        ...

    def widen_from(self, dtype: torch.dtype) -> int | None:
        """From how many rows on a weight of `dtype` is best widened to float32 for a product.

        None: never.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that a clock may be read."""
        ...

    def reset_peak_memory(self) -> None:
        """Forget how much memory was taken so far."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """The most that was taken at once since then, or None where this cannot be known.

        On an accelerator that is what tensors took there, on a CPU the whole process.
        """
        ...


@dataclass(frozen=True)
class Traffic:
    """What this rank has handed to collectives, and how long it has waited for them.

    On a GPU waiting is the device's, and `seconds` only what the calls took.
    """

    num_calls: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class ParallelGroup(Group, Protocol):
    """Ranks that also pass words: the leader says what comes next, the others hear it."""

    traffic: Traffic

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        ...

    def send(self, message: bytes) -> None:
        """Say it to all others. For the leader."""
        ...

    def receive(self) -> bytes:
        """Wait for what the leader says, however long it takes."""
        ...
