"""Names for models: found in the cache, listed, deleted."""

import os
import shutil
from pathlib import Path

import pytest

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.checkpoint import shelf
from minigpt4_runtime.errors import CheckpointError


@pytest.fixture
def shelved(cache_home, vicuna_folder):
    """The cache with one model in it."""
    return Path(shutil.copytree(vicuna_folder, cache_home / "models" / "vicuna-7b"))


def test_a_name_is_found_in_the_cache(shelved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shelf.find_model("vicuna-7b") == shelved
    assert shelf.find_model(Path("vicuna-7b")) == shelved
    assert MiniGPT4.load("vicuna-7b").model_dir == shelved


def test_a_model_folder_of_that_path_comes_first(shelved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The published language model has this very name, and is no model folder.
    (tmp_path / "vicuna-7b").mkdir()
    assert shelf.find_model("vicuna-7b") == shelved
    shutil.copytree(shelved, tmp_path / "vicuna-7b", dirs_exist_ok=True)
    assert shelf.find_model("vicuna-7b") == Path("vicuna-7b")


def test_a_path_is_never_a_name(shelved, tmp_path):
    path = tmp_path / "elsewhere" / "vicuna-7b"
    assert shelf.find_model(path) == path


def test_a_bundled_model_has_a_name(cache_home, vicuna_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo-boxes"):
        assert shelf.find_model(name) == shelf.BUNDLED_DIR / name
        assert (shelf.BUNDLED_DIR / name / "config.json").is_file()
    # A folder of that name is what was meant, and so is a fetched model.
    (tmp_path / "demo").mkdir()
    assert shelf.find_model("demo") == Path("demo")
    (tmp_path / "demo").rmdir()
    fetched = shutil.copytree(vicuna_folder, cache_home / "models" / "demo")
    assert shelf.find_model("demo") == fetched


def test_a_known_name_that_is_not_there(cache_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Run: minigpt4 fetch llama2-7b"):
        MiniGPT4.load("llama2-7b")
    with pytest.raises(CheckpointError, match=r"w4a16 is .* fetch vicuna-7b --format w4a16$"):
        MiniGPT4.load("vicuna-7b-w4a16")
    for name in ("somewhere", "vicuna-7b-mine", "mine-w4a16", "-w4a16"):
        with pytest.raises(CheckpointError, match=f"{name} does not exist"):
            MiniGPT4.load(name)


def test_listing_and_deleting(shelved, cache_home):
    (cache_home / "models" / "half").mkdir()
    (cache_home / "downloads" / "tower").mkdir(parents=True)
    (cache_home / "downloads" / "tower" / "a.pth.partial").write_bytes(bytes(1000))
    (model,) = shelf.list_models()
    assert (model.name, model.path) == ("vicuna-7b", shelved)
    assert model.num_bytes == sum(path.stat().st_size for path in shelved.iterdir())
    assert shelf.delete("vicuna-7b") == model.num_bytes
    assert shelf.list_models() == []
    assert shelf.delete("downloads") == 1000
    assert not (cache_home / "downloads").exists()
    # Every fetch makes the folder, a dry run too.
    (cache_home / "downloads").mkdir()
    with pytest.raises(CheckpointError, match="There is no downloads in"):
        shelf.delete("downloads")


@pytest.mark.parametrize("name", ["vicuna-13b", "..", "", "../photos", "models", "half"])
def test_only_what_is_listed_can_be_deleted(shelved, cache_home, name):
    (cache_home / "models" / "half").mkdir()
    with pytest.raises(CheckpointError, match="there is vicuna-7b"):
        shelf.delete(name)
    assert shelved.exists()


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "minigpt4"),
        ("win32", "LOCALAPPDATA", "minigpt4"),
        pytest.param(
            "darwin",
            "HOME",
            "Library/Caches/minigpt4",
            marks=pytest.mark.skipif(os.name != "posix", reason="HOME as Unix has it"),
        ),
    ],
)
def test_the_system_says_where_caches_are(tmp_path, monkeypatch, platform, variable, expected):
    monkeypatch.delenv(shelf.HOME_VARIABLE, raising=False)
    monkeypatch.setattr(shelf.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert shelf.home_dir() == tmp_path / expected
    monkeypatch.setenv(shelf.HOME_VARIABLE, str(tmp_path / "mine"))
    assert shelf.home_dir() == tmp_path / "mine"
