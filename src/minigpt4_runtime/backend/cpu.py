"""The CPU. Owns its facts and its free memory; needs nothing that torch does not bring."""

from pathlib import Path

import torch

from minigpt4_runtime.backend.contracts import DeviceFacts


class CpuBackend:
    """All cores of this machine, as one device."""

    facts = DeviceFacts(default_dtype="float32", attention="reference")

    def __init__(self, index: int | None = None) -> None:  # noqa: ARG002
        self.device = torch.device("cpu")

    def free_memory_bytes(self) -> int | None:
        """What Linux says a new program may take, swap included; None on other systems."""
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        free = [
            int(line.split()[1]) * 1024
            for line in lines
            if line.startswith(("MemAvailable:", "SwapFree:"))
        ]
        return sum(free) if free else None
