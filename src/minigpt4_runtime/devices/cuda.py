"""NVIDIA GPUs. Owns their facts and the check that there is one.

Checked without one: no test of this project has run on a GPU yet.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from minigpt4_runtime.devices.contracts import DeviceFacts, Replay
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.optional import runs_triton


class CudaBackend:
    """One CUDA device. Opening it turns cuDNN's attention off in this process."""

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
        # cuDNN builds a plan for every length of a context, which takes the host tens of
        # milliseconds; a step has lengths that no step before had.
        torch.backends.cuda.enable_cudnn_sdp(False)
        capability = torch.cuda.get_device_capability(self.device)
        attention = ("triton", "sdpa") if runs_triton(capability) else ("sdpa",)
        self.facts = DeviceFacts(
            default_dtype="float16",
            attention=attention,
            cache_share=0.9,
            collective="nccl",
            has_float8=capability >= (8, 9),
            captures_sums=True,
            runs_ahead=True,
        )
        # All graphs use one pool of memory, since only one of them runs at a time.
        self._pool = torch.cuda.graph_pool_handle()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Where all graphs are captured.

        They share memory only if they share a stream, and cuBLAS takes memory for each stream.
        """
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def free_memory_bytes(self) -> int | None:
        """The free memory of this device, from its driver."""
        return torch.cuda.mem_get_info(self.device)[0]

    def widen_from(self, dtype: torch.dtype) -> int | None:  # noqa: ARG002
        """Never: half-precision products are the fast ones here."""
        return None

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """See `DeviceBackend`. The result's tensor stays the graph's own."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        is_inference, has_gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        with torch.cuda.device(self.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream().wait_stream(stream)
            with (
                # The first capture makes tensors that torch fills at all others of this process,
                # and at replays. Made in inference mode, they could not be filled outside of it.
                torch.inference_mode(False),
                # Other threads may go on: they prepare pictures, and NCCL's watches its sums.
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
                torch.inference_mode(is_inference),
                torch.set_grad_enabled(has_gradients),
            ):
                result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Forget how much memory was taken so far."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self) -> int | None:
        """The most that tensors took on this device since then."""
        return int(torch.cuda.max_memory_allocated(self.device))
