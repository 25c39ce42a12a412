"""Which launches overlap. What the kernels do then, their own tests and a GPU's show."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from minigpt4_runtime.kernels import launching


@pytest.mark.parametrize(
    ("device", "capability", "driver", "cuda", "overlaps"),
    [
        ("cuda:0", (9, 0), 12030, "12.6", True),
        ("cuda:0", (10, 0), 13000, "13.0", True),
        ("cuda:0", (8, 9), 13000, "13.0", False),
        ("cuda:0", (9, 0), 12020, "12.6", False),
        ("cuda:0", (9, 4), 0, None, False),  # A build for AMD's GPUs calls them cuda too.
        ("cpu", (9, 0), 13000, "13.0", False),
    ],
)
def test_kernels_overlap_where_the_gpu_and_its_driver_can(
    monkeypatch, device, capability, driver, cuda, overlaps
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    launching.can_overlap.cache_clear()
    found = launching.overlapping(torch.device(device))
    launching.can_overlap.cache_clear()
    assert found["OVERLAPS"] is overlaps
    assert found.get("launch_pdl", False) is overlaps
