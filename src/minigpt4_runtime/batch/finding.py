"""Paths, addresses and - as typed → the images to describe, in order.

Owns   the rule for images inside a folder, and the reading of addresses and stdin.
Takes  paths, addresses and - as typed; gives places, each once.
Never  opens an image, or skips one in silence if all are wanted.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import ImageSource

STDIN = "-"
# A path; or an address or STDIN as text.
Place = Path | str
P = TypeVar("P", Path, Place)


def read_place(text: str) -> Place:
    """Read a typed place: an address, stdin, or a path, also as a file: URL.

    Raises:
        ImageError: it is a URL of another kind.
    """
    if text == STDIN or re.match("https?:", text, re.IGNORECASE):
        return text
    if not re.match("file:", text, re.IGNORECASE):
        return Path(text)
    from minigpt4_runtime.images.pixels import path_of

    return path_of(text, text)


def source_of(place: Place, *, allows_local: bool) -> ImageSource:
    """The image there: stdin is read now, an address when the image is opened.

    Raises:
        BackendUnavailableError: fetching needs a package that is not here.
    """
    if isinstance(place, Path):
        return ImageSource(place)
    if place == STDIN:
        from minigpt4_runtime.images.pixels import DEFAULT_LIMITS

        # One byte above the limit, so that a larger image is refused and not cut.
        content = sys.stdin.buffer.read(DEFAULT_LIMITS.max_bytes + 1)
        return ImageSource(content, label="- (stdin)")
    from minigpt4_runtime.images.fetch import Target, fetch

    return ImageSource(
        lambda: asyncio.run(fetch(Target.read(place), allows_local=allows_local)), label=place
    )


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir may raise an error.


def is_missing(path: Path) -> bool:
    """Whether there is nothing at `path`. A path that may not be read is not missing."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


_OTHER_FOLDER = "Name another folder."


def hint_of_r(recursive: bool) -> str:
    """What to do about a folder without images, where -r can be given."""
    return _OTHER_FOLDER if recursive else "-r looks into its subfolders too."


def find_images(
    places: Sequence[P],
    *,
    recursive: bool,
    with_unreadable: bool = False,
    hint: str = _OTHER_FOLDER,
) -> list[P]:
    """Give places unchanged, and for a folder the images in it, sorted, each once.

    `with_unreadable` includes images in formats that are not read here. `hint` ends the error about
    a folder that holds no image.

    Raises:
        ConfigError: a folder cannot be read or holds no image.
    """
    found: dict[Place, P] = {}
    for place in places:
        within: Sequence[P] = [place]
        if isinstance(place, Path) and is_folder(place):
            within = sorted(walk(place, recursive=recursive, with_unreadable=with_unreadable))
            if not within:
                raise ConfigError(f"There are no pictures in the folder {place}. {hint}")
        for each in within:
            found.setdefault(each.absolute() if isinstance(each, Path) else each, each)
    return list(found.values())


def walk(folder: Path, *, recursive: bool, with_unreadable: bool = False) -> Iterator[Path]:
    """Give the images in a folder, in no order; hidden ones are left out.

    Raises:
        ConfigError: it cannot be read.
    """
    from minigpt4_runtime.images.formats import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES

    suffixes = IMAGE_SUFFIXES | UNREADABLE_SUFFIXES if with_unreadable else IMAGE_SUFFIXES
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(parent, name)


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(
        f"The folder {error.filename} cannot be read ({error.strerror}). Check its permissions."
    )
