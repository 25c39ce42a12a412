"""Published files to convert: the goldens as they are, and copies that a test may change."""

import shutil
from pathlib import Path

import pytest
import torch
from published_files import GOLDENS, PROJECTIONS, copy_golden, files_of

from minigpt4_runtime.checkpoint.convert import PublishedFiles, convert


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """These tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(PROJECTIONS))
def variant(request) -> str:
    return request.param


@pytest.fixture
def published(variant) -> PublishedFiles:
    """The golden checkpoint of each variant. Do not change it."""
    return files_of(variant, GOLDENS / variant / "checkpoint")


@pytest.fixture
def vicuna(tmp_path) -> PublishedFiles:
    """A copy of the Vicuna golden, to be changed."""
    return copy_golden("vicuna", tmp_path / "published")


@pytest.fixture
def llama2(tmp_path) -> PublishedFiles:
    """A copy of the Llama-2 golden, to be changed."""
    return copy_golden("llama2", tmp_path / "published")


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
