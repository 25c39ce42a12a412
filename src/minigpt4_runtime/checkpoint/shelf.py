"""The cache of fetched models, in which each is found by its name, and the bundled models.

Owns   the cache folder: models/NAME are model folders, downloads/ are files not yet converted.
Takes  a user's choice of a model: a path or a name. MINIGPT4_HOME moves the whole cache.
Never  reads a weight, loads torch, or deletes anything outside the cache.
"""

import os
import re
import shutil
import sys
import uuid
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from minigpt4_runtime.checkpoint.manifest import MANIFEST_NAME
from minigpt4_runtime.checkpoint.sources import read_sources
from minigpt4_runtime.errors import CheckpointError, ConfigError

# The models that come with the package: `demo` and `demo-boxes`.
BUNDLED_DIR = Path(__file__).parents[1] / "assets"
HOME_VARIABLE = "MINIGPT4_HOME"
DOWNLOADS = "downloads"
# The name of a folder while it is made or deleted.
_REMAINS = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|deleted)")
# The end of the name of a model that was fetched in this --format.
_IN_A_FORMAT = re.compile(r"-(w\d+a\d+.*)")


@dataclass(frozen=True)
class ShelvedModel:
    """A model folder in the cache, and its size on the disk."""

    name: str
    path: Path
    num_bytes: int


def home_dir() -> Path:
    """The cache: $MINIGPT4_HOME, or `minigpt4` in the folder for caches of this system's user.

    Raises:
        ConfigError: it would be in a user's home, and the system knows of none.
    """
    try:
        if own := os.environ.get(HOME_VARIABLE):
            return Path(own).expanduser()
        return _users_caches() / "minigpt4"
    except RuntimeError:
        raise ConfigError(
            "The cache would be in a user's home folder, and the system knows of none. Set "
            f"{HOME_VARIABLE} to a folder that can be written."
        ) from None


def _users_caches() -> Path:
    if sys.platform == "win32":
        above = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        above = Path.home() / "Library" / "Caches"
    else:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above)


def models_dir() -> Path:
    """The folder of the cache's model folders."""
    return home_dir() / "models"


def downloads_dir() -> Path:
    """The folder of downloads that are not yet converted."""
    return home_dir() / DOWNLOADS


def find_model(model: str | PathLike[str]) -> Path:
    """The folder of a path or a name. A model folder of that path comes before a name.

    Of one name, a fetched model comes before a bundled one.

    Raises:
        CheckpointError: it is the name of a model that was not fetched yet.
    """
    path = Path(model)
    if (path / MANIFEST_NAME).exists() or path.name != str(model):
        return path
    shelved = models_dir() / path.name
    if shelved.is_dir():
        return shelved
    if not path.is_dir() and (BUNDLED_DIR / path.name / MANIFEST_NAME).is_file():
        return BUNDLED_DIR / path.name
    if not path.is_dir() and (fetch := _fetch_command(path.name)):
        raise CheckpointError(f"{path.name} is not in {models_dir()} yet. Run: {fetch}")
    return path


def _fetch_command(name: str) -> str | None:
    """The command that makes the model of this name, such as vicuna-7b-w4a16; None for others."""
    ending = _IN_A_FORMAT.search(name)
    source, weights = (name[: ending.start()], f" --format {ending[1]}") if ending else (name, "")
    return f"minigpt4 fetch {source}{weights}" if source in read_sources() else None


def list_models() -> list[ShelvedModel]:
    """The models of the cache, by name."""
    if not models_dir().is_dir():
        return []
    return [
        ShelvedModel(path.name, path, measure(path))
        for path in sorted(models_dir().iterdir())
        if (path / MANIFEST_NAME).is_file() and not path.name.startswith(".")
    ]


def measure(folder: Path) -> int:
    """The size of all files of a folder together, in bytes."""
    files = folder.rglob("*") if folder.is_dir() else ()
    return sum(path.lstat().st_size for path in files if not path.is_dir())


def clear_remains() -> None:
    """Remove the remains of killed conversions and deletions, while no other is running."""
    for folder in (home_dir(), models_dir()):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not _REMAINS.fullmatch(path.name):
                continue
            # Of a link to a model elsewhere, only the link goes.
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


def is_cleared(model_dir: Path) -> bool:
    """Whether `clear_remains` removes the remains of an interrupted conversion to this folder."""
    try:
        return model_dir.resolve().parent in (home_dir().resolve(), models_dir().resolve())
    except ConfigError:
        return False  # There is no cache.


def delete(name: str) -> int:
    """Delete a model of the cache, or all downloads, and say how many bytes that gave back.

    Raises:
        CheckpointError: there is none of that name.
    """
    known = {model.name: model.path for model in list_models()}
    if downloads_dir().is_dir() and any(downloads_dir().iterdir()):
        known[DOWNLOADS] = downloads_dir()
    if name not in known:
        raise CheckpointError(
            f"There is no {name} in {home_dir()}; there is {', '.join(known) or 'nothing'}."
        )
    folder = known[name]
    # Of a link to a model elsewhere, only the link goes.
    num_bytes = 0 if folder.is_symlink() else measure(folder)
    # Renamed first: after an interruption the rest must not pass for a model.
    going = folder.with_name(f".{name}.{uuid.uuid4().hex[:8]}.deleted")
    try:
        folder.rename(going)
        going.unlink() if going.is_symlink() else shutil.rmtree(going)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be deleted whole: {error}") from None
    return num_bytes
