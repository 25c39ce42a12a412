"""Without the CPU kernels everything works as before, and one sentence says what is lost."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.kernels import native
from minigpt4_runtime.kernels.registry import linear_kernel


@pytest.fixture
def find_again():
    for kept in (native.find, native._warn_once):
        kept.cache_clear()
    yield
    for kept in (native.find, native._warn_once):
        kept.cache_clear()


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a8-g32", "w4a16-g32-asymmetric"])
def test_a_format_multiplies_by_itself(monkeypatch, find_again, caplog, name):
    monkeypatch.setitem(sys.modules, "minigpt4_kernels", None)
    weight_format = INTEGER_FORMATS[name]
    kernel = linear_kernel(weight_format, device=torch.device("cpu"), widen_from=None)
    assert kernel == weight_format.multiply
    linear_kernel(weight_format, device=torch.device("cpu"), widen_from=None)
    assert caplog.messages == [native.find()[1]]
    module, lost = native.find()
    assert module is None
    assert "not installed: quantised weights are multiplied by plain torch" in lost
    assert lost.endswith(native.INSTALL)


def test_a_build_for_another_torch_is_named(monkeypatch, find_again):
    def fail(name):
        raise OSError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(importlib, "import_module", fail)
    module, lost = native.find()
    assert module is None
    assert f"cannot be loaded by torch {torch.__version__} (undefined symbol" in lost


def test_a_build_of_another_version_is_not_used(monkeypatch, find_again):
    """Its operators take other arguments."""
    package = ModuleType("minigpt4_kernels")
    monkeypatch.setitem(sys.modules, "minigpt4_kernels", package)
    for _ in ("the first version", "a later one"):
        native.find.cache_clear()
        module, lost = native.find()
        assert module is None
        assert "are of another version than this package" in lost
        assert lost.endswith(native.INSTALL)
        package.INTERFACE = 99


def test_the_build_beside_these_tests_is_of_this_version():
    kernels = pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
    assert kernels.INTERFACE == native._INTERFACE


def test_a_broken_package_is_not_hidden(monkeypatch, find_again):
    def fail(name):
        raise ModuleNotFoundError("No module named 'ctypes'", name="ctypes")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="ctypes"):
        native.find()
