"""Ascend NPUs, through torch_npu. Owns their facts and the check that there is one.

Checked against its contract only: no test of this project has run on Ascend hardware yet.
"""

import torch

from minigpt4_runtime.devices.contracts import Capture, DeviceFacts
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.optional import require


class NpuBackend:
    """One Ascend device."""

    facts = DeviceFacts(
        default_dtype="float16",
        attention=("npu", "sdpa"),
        cache_share=0.9,
        collective="hccl",
        has_float64=False,
    )

    capture: Capture | None = None

    def __init__(self, index: int | None = None) -> None:
        self._npu = require("torch_npu", install="pip install torch_npu").npu
        count = self._npu.device_count() if self._npu.is_available() else 0
        if not count:
            raise BackendUnavailableError(
                "torch_npu finds no Ascend device on this machine. Use --device cpu."
            )
        if index is not None and index >= count:
            raise BackendUnavailableError(
                f"npu:{index} does not exist; this machine has npu:0 to npu:{count - 1}."
            )
        self.device = torch.device("npu", index or 0)

    def free_memory_bytes(self) -> int | None:
        """The free memory of this device, from its driver."""
        return int(self._npu.mem_get_info(self.device)[0])

    def widen_from(self, dtype: torch.dtype) -> int | None:  # noqa: ARG002
        """Never: half-precision products are the fast ones here."""
        return None

    def synchronize(self) -> None:
        """Wait for the device."""
        self._npu.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Forget how much memory was taken so far."""
        self._npu.reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self) -> int | None:
        """The most that tensors took on this device since then."""
        return int(self._npu.max_memory_allocated(self.device))
