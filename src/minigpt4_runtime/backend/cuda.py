"""NVIDIA GPUs. Owns their facts and the check that there is one."""

import torch

from minigpt4_runtime.backend.contracts import DeviceFacts
from minigpt4_runtime.errors import BackendUnavailableError


class CudaBackend:
    """One CUDA device."""

    facts = DeviceFacts(default_dtype="float16", attention="reference")

    def __init__(self, index: int | None = None) -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise BackendUnavailableError(
                "This machine has no CUDA device that torch can use. "
                "Use --device cpu, or install a torch build for your GPU."
            )
        if index is not None and index >= count:
            raise BackendUnavailableError(
                f"cuda:{index} does not exist; this machine has cuda:0 to cuda:{count - 1}."
            )
        self.device = torch.device("cuda", index or 0)

    def free_memory_bytes(self) -> int | None:
        """What the driver says is free on this device."""
        return torch.cuda.mem_get_info(self.device)[0]
