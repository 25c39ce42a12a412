"""Published files that a test may change."""

import pytest
from published_files import copy_golden

from minigpt4_runtime.convert.convert import PublishedFiles


@pytest.fixture
def vicuna(tmp_path) -> PublishedFiles:
    """A copy of the Vicuna golden, to be changed."""
    return copy_golden("vicuna", tmp_path / "published")


@pytest.fixture
def minigptv2(tmp_path) -> PublishedFiles:
    """A copy of the MiniGPT-v2 golden, to be changed."""
    return copy_golden("minigptv2", tmp_path / "published-v2")


@pytest.fixture
def llama2(tmp_path) -> PublishedFiles:
    """A copy of the Llama-2 golden, to be changed."""
    return copy_golden("llama2", tmp_path / "published")
