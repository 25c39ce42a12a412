"""Pictures as they were uploaded to the page: found again, and nothing else of this machine.

Owns   what counts as uploaded.
Takes  the paths that a browser names; gives those that lie in Gradio's upload folder.
Never  opens a picture, nor fetches one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.optional import require
from minigpt4_runtime.web.dialogue import INSTALL

gradio = require("gradio", install=INSTALL)


@dataclass(frozen=True)
class Asked:
    """What stands in the question box."""

    text: str = ""
    pictures: tuple[Path, ...] = ()

    def as_value(self) -> dict[str, Any]:
        """The same as the box shows it."""
        return {"text": self.text, "files": [str(picture) for picture in self.pictures]}


class Uploads:
    """The folder into which Gradio puts what is uploaded for a component."""

    def __init__(self, component: Any) -> None:
        self._folder = Path(component.GRADIO_CACHE).resolve()

    def find(self, name: str) -> Path:
        """The picture of this path, if it was uploaded.

        Raises:
            gradio.Error: it lies elsewhere, or is not there any more.
        """
        try:
            path = Path(name).resolve()
            is_here = path.is_relative_to(self._folder) and path.is_file()
        except (OSError, ValueError):  # A name that no file can have.
            is_here = False
        if not is_here:
            raise not_uploaded()
        return path

    def read(self, value: Mapping[str, Any] | None) -> Asked:
        """What the question box holds, as Gradio gives it: it checks no path.

        Raises:
            gradio.Error: a picture in it was not uploaded.
        """
        value = value or {}
        return Asked(value.get("text", ""), tuple(map(self.find, value.get("files", ()))))


def not_uploaded() -> Exception:
    """The error for a picture that is no upload."""
    return gradio.Error(  # type: ignore[no-any-return]
        "This picture is not here. Upload it again.", duration=5, print_exception=False
    )


async def fetch_nothing(*_: object, **__: object) -> str:
    """What Gradio does with an address in place of a file: it would fetch it, however large."""
    raise not_uploaded()
