"""Model folders, converted from the goldens."""

import shutil
from pathlib import Path

import pytest
from published_files import GOLDENS, files_of

from minigpt4_runtime.convert.convert import convert


@pytest.fixture(scope="session")
def vicuna_folder(tmp_path_factory) -> Path:
    """The Vicuna golden, converted to float16. Do not change it."""
    out_dir = tmp_path_factory.mktemp("converted") / "vicuna"
    convert(files_of("vicuna", GOLDENS / "vicuna" / "checkpoint"), out_dir, dtype="float16")
    return out_dir


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory) -> Path:
    """The Vicuna golden as it was published, in float16 and float32. Do not change it."""
    out_dir = tmp_path_factory.mktemp("converted") / "mixed"
    convert(files_of("vicuna", GOLDENS / "vicuna" / "checkpoint"), out_dir)
    return out_dir


@pytest.fixture
def model_dir(vicuna_folder, tmp_path) -> Path:
    """A copy of the converted Vicuna golden, to be changed."""
    return Path(shutil.copytree(vicuna_folder, tmp_path / "model"))
