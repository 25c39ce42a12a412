"""Devices are found by name; what is absent is said in one sentence."""

import importlib
import subprocess
import sys
import types

import pytest
import torch

from minigpt4_runtime import BackendUnavailableError, ConfigError
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.optional import require


def test_cpu_knows_itself():
    backend = open_device("cpu")
    assert backend.device == torch.device("cpu")
    assert backend.facts.default_dtype == "float32"
    free = backend.free_memory_bytes()
    assert free is None or free > 2**20
    backend.synchronize()
    backend.reset_peak_memory()
    peak = backend.peak_memory_bytes()
    assert peak is None or peak > 2**20


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:x", "", "CUDA", "npu:-1"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda"):
        open_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_absent_devices_are_said_and_auto_falls_back():
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        open_device("cuda")
    with pytest.raises(BackendUnavailableError, match="torch_npu is not installed"):
        open_device("npu:0")
    assert open_device("auto").device.type == "cpu"


FAKE_NPU = """
import sys, types
import torch
from minigpt4_runtime import BackendUnavailableError
from minigpt4_runtime.devices.registry import open_device

asked = []

def install(count):
    module = sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    module.npu = types.SimpleNamespace(
        is_available=lambda: count > 0, device_count=lambda: count,
        mem_get_info=lambda device: (10, 20),
        max_memory_allocated=lambda device: 30 + device.index,
        synchronize=lambda device: asked.append(("synchronize", device.index)),
        reset_peak_memory_stats=lambda device: asked.append(("reset", device.index)),
    )

def refusal(name):
    try:
        open_device(name)
    except BackendUnavailableError as error:
        return str(error)

torch.utils.rename_privateuse1_backend("npu")
install(2)
backend = open_device("npu:1")
assert backend.device == torch.device("npu", 1)
assert backend.free_memory_bytes() == 10
assert backend.peak_memory_bytes() == 31
backend.synchronize()
backend.reset_peak_memory()
assert asked == [("synchronize", 1), ("reset", 1)]
assert "npu:0 to npu:1" in refusal("npu:7")
install(0)
assert "finds no Ascend device" in refusal("npu")
"""


def test_npu_is_asked_through_torch_npu():
    # In a process of its own: torch's new name for a device would stay for all other tests.
    subprocess.run([sys.executable, "-c", FAKE_NPU], check=True)


def test_auto_passes_a_broken_package_by(monkeypatch):
    broken = types.ModuleType("torch_npu")
    broken.__getattr__ = lambda name: importlib.import_module("a_library_that_is_not_there")
    monkeypatch.setitem(sys.modules, "torch_npu", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="a_library_that_is_not_there"):
        assert open_device("auto").device.type == "cpu"
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        open_device("npu")


def test_a_broken_package_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        require("halfway", install="pip install halfway")
    with pytest.raises(BackendUnavailableError, match="Run: pip install nothing-here"):
        require("nothing_here", install="pip install nothing-here")


@pytest.mark.gpu
def test_cuda_knows_itself():
    backend = open_device("cuda:0")
    assert backend.facts.default_dtype == "float16"
    assert backend.free_memory_bytes() > 2**20
    backend.reset_peak_memory()
    before = backend.peak_memory_bytes()
    block = torch.ones(2**20, device=backend.device)
    backend.synchronize()
    assert backend.peak_memory_bytes() >= before + block.nbytes
    with pytest.raises(BackendUnavailableError, match="does not exist"):
        open_device("cuda:99")
