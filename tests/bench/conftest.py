"""The demo model, and ceilings that take no time to measure."""

import pytest

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.bench import ceilings


# For one file only: what is measured leaves the engine with settings of its own.
@pytest.fixture(scope="module")
def demo_model():
    return MiniGPT4.load(device="cpu")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "SUMMED_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIDE", 64)
    ceilings.measure_ceilings.cache_clear()
    yield
    ceilings.measure_ceilings.cache_clear()
