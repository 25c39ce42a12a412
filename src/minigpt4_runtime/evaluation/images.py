"""The images that answers are about, in a folder that the user names.

Owns   how a name in a file of answers leads to an image, and thumbnails for pages.
Takes  a folder and names.
"""

import re
from pathlib import Path

from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import image
from minigpt4_runtime.report.page import thumbnail


def check_folder(images_dir: Path) -> None:
    """Refuse a missing folder before anything is computed.

    Raises:
        ConfigError: there is no such folder.
    """
    if not images_dir.is_dir():
        raise ConfigError(f"--images is {images_dir}, and there is no such folder.")


def find_image(images_dir: Path, path: str) -> str | None:
    """The longest end of an image's path elsewhere that is a file in this folder.

    Example: /data/coco/val/7.jpg is val/7.jpg if the folder has that file, or else 7.jpg.
    """
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..")]
    names = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((name for name in names if (images_dir / name).is_file()), None)


def find_thumbnail(images_dir: Path | None, path: str) -> str | None:
    """The image as a data URL; None if it is not there or cannot be read."""
    found = images_dir and find_image(images_dir, path)
    if not (images_dir and found):
        return None
    try:
        return thumbnail(open_rgb(image(images_dir / found)))
    except ImageError:
        return None
