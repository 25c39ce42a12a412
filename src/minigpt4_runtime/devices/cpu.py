"""The CPU. Owns its facts and its free memory; needs only torch."""

from contextlib import suppress
from pathlib import Path

import torch

from minigpt4_runtime.devices.contracts import Capture, DeviceFacts
from minigpt4_runtime.devices.control_group import allowed_memory_bytes


class CpuBackend:
    """All cores of this machine, as one device."""

    facts = DeviceFacts(
        default_dtype="float32",
        attention=("native", "sdpa"),
        cache_share=0.5,
        collective="gloo",
        shares_memory=True,
        joins=False,
    )

    capture: Capture | None = None

    def __init__(self, index: int | None = None) -> None:  # noqa: ARG002
        self.device = torch.device("cpu")

    def free_memory_bytes(self) -> int | None:
        """The memory that Linux offers a new program, swap included; None on other systems.

        A container's or service's own limit counts too.
        """
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        free = [
            int(line.split()[1]) * 1024
            for line in lines
            if line.startswith(("MemAvailable:", "SwapFree:"))
        ]
        allowed = allowed_memory_bytes()
        return min(sum(free), sum(free) if allowed is None else allowed) if free else None

    def widen_from(self, dtype: torch.dtype) -> int | None:
        """Measured with benchmarks/linear_routes.py, see docs/log.md."""
        if dtype == torch.bfloat16:
            return None if _multiplies_bfloat16() else 64
        return 32 if dtype == torch.float16 else None

    def synchronize(self) -> None:
        """Nothing to wait for: a CPU has finished when a call returns."""

    def reset_peak_memory(self) -> None:
        """Linux takes the present size for the peak from here on (proc(5), clear_refs)."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_memory_bytes(self) -> int | None:
        """The process's largest size in memory, its mapped files included; None but on Linux."""
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
        except OSError:
            return None
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
