"""The pictures of a run with the boxes of their answers, as PNG files in a folder.

Owns   the names of these files.
Takes  records and their images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from minigpt4_runtime.batch.results import Record
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.new_folder import new_folder
from minigpt4_runtime.report.files import check_folder, write_whole, writing


class Drawings:
    """A folder, made with its first drawing. A drawing replaces an older one of the same name."""

    def __init__(self, folder: Path, images: Sequence[str]) -> None:
        """`images` are all images of the run: two of one name get different files.

        Raises:
            ConfigError: the folder cannot be made or written to.
        """
        check_folder(folder, "--draw")
        self._folder = folder
        self._paths: dict[str, Path] = {}
        taken: set[str] = set()
        for name in dict.fromkeys(images):
            stem = Path(name.rpartition("/")[2]).stem[:100] or "picture"
            stem = "".join(each if each.isalnum() or each in "-_. " else "_" for each in stem)
            number = 1
            file = f"{stem}.png"
            while file.casefold() in taken:
                number += 1
                file = f"{stem}-{number}.png"
            taken.add(file.casefold())
            self._paths[name] = folder / file

    @classmethod
    def open(cls, folder: Path | None, images: Sequence[str]) -> Self | None:
        """The drawings in this folder; None without one."""
        return None if folder is None else cls(folder, images)

    def add(self, record: Record, source: ImageSource) -> None:
        """Draw the boxes of a record on its image.

        Raises:
            ImageError: the image cannot be opened again.
            ConfigError: the drawing cannot be written.
        """
        from minigpt4_runtime.images.drawing import draw_boxes
        from minigpt4_runtime.images.pixels import open_rgb

        content = io.BytesIO()
        draw_boxes(open_rgb(source), record.boxes or ()).save(content, "PNG")
        with writing(self._folder), new_folder(self._folder):
            write_whole(self._paths[record.image], content.getvalue())
