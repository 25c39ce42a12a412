"""Models to be studied, loaded once."""

from functools import cache

import pytest
from golden_cases import GOLDENS, Golden

from minigpt4_runtime import MiniGPT4


@pytest.fixture(scope="session")
def golden_of(golden_model_dir):
    """A golden checkpoint by its name."""

    @cache
    def load(name):
        model = MiniGPT4.load(golden_model_dir(name), device="cpu", dtype="float32")
        return Golden(GOLDENS / name, model)

    return load


@pytest.fixture(scope="session")
def vicuna(golden_of):
    return golden_of("vicuna")


@pytest.fixture
def lab(vicuna):
    return vicuna.model.lab()


@pytest.fixture
def prompt(vicuna, lab):
    """A question about a picture."""
    return lab.prompt(vicuna.question(vicuna.cases("single")[0]))
