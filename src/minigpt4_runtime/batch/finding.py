"""Paths, addresses and - as typed → the images to describe, in order.

Owns   what counts as an image inside a folder, and how addresses and stdin are read.
Takes  paths, addresses and - as typed; gives places, paths made by joining, each once.
Never  opens an image, or passes over one in silence where all are asked for.
"""

import asyncio
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import ImageSource

STDIN = "-"
# A path; or text where it is an address, or STDIN.
Place = Path | str
P = TypeVar("P", Path, Place)


def read_place(text: str) -> Place:
    """Tell what a person means: an address, stdin, or a path, also as a file: URL.

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

        # One more than may be: so an image that is too large is refused, not cut.
        content = sys.stdin.buffer.read(DEFAULT_LIMITS.max_bytes + 1)
        return ImageSource(content, label="- (stdin)")
    from minigpt4_runtime.images.fetch import Target, fetch

    return ImageSource(
        lambda: asyncio.run(fetch(Target.read(place), allows_local=allows_local)), label=place
    )


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def is_missing(path: Path) -> bool:
    """Whether there is nothing at `path`. What may not be looked at is not missing."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def find_images(places: Sequence[P], *, recursive: bool, with_unreadable: bool = False) -> list[P]:
    """Give places as they are, and for a folder the images in it, sorted. None comes twice.

    `with_unreadable` gives those too that are plainly images, but in no format that is read here.

    Raises:
        ConfigError: a folder cannot be read or holds no image.
    """
    found: dict[Place, P] = {}
    for place in places:
        within: Sequence[P] = [place]
        if isinstance(place, Path) and is_folder(place):
            within = sorted(walk(place, recursive=recursive, with_unreadable=with_unreadable))
            if not within:
                hint = "Name another folder." if recursive else "-r looks into its subfolders too."
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
