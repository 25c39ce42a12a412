"""What every device, kernel and vision encoder must offer; the only part the engine sees.

Owns   the protocols and the frozen values that pass through them.
Takes  nothing: there is no code here that runs.
Never  names a device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minigpt4_runtime.config import DTypeName


@dataclass(frozen=True)
class DeviceFacts:
    """What is true of a kind of device: these replace `if device == "cuda"`."""

    default_dtype: DTypeName
    attention: str  # A name in registry.ATTENTION_KERNELS.


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


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one layer, each (num_slots, Hkv, D)."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class SequenceSlice:
    """Which rows of a step belong to one sequence, and where that sequence is cached.

    `slots` are the cache slots of its tokens from the first to the last of this step, so that the
    step's own tokens go to the last `num_rows` of them.
    """

    first_row: int
    num_rows: int
    slots: Tensor


@dataclass(frozen=True)
class BatchLayout:
    """The sequences of one step, whose tokens are packed into T rows."""

    sequences: tuple[SequenceSlice, ...]


class AttentionKernel(Protocol):
    """Causal attention over a cache, for packed sequences of any lengths."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: KeyValueCache, batch: BatchLayout
    ) -> Tensor:
        """Write k and v into the cache and attend: (T, H, D), 2 × (T, Hkv, D) → (T, H, D)."""
        ...


class VisionEncoder(Protocol):
    """The image side as one graph: ViT, ln_vision, Q-Former or grouping, projection."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float32 → (N, rows, hidden), on the language model's device and dtype."""
        ...
