"""The images that were uploaded to the page.

Owns   the check that a path is an upload, and no other file of this machine.
Takes  the paths that a browser names; gives those in Gradio's upload folder.
Never  opens an image or fetches one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.optional import require

gradio = require("gradio", extra="web")


@dataclass(frozen=True)
class QuestionBox:
    """The content of the question box."""

    text: str = ""
    images: tuple[Path, ...] = ()

    def as_value(self) -> dict[str, Any]:
        """The content in Gradio's form."""
        return {"text": self.text, "files": list(map(str, self.images))}


class Uploads:
    """The folder in which Gradio keeps the uploads of a component."""

    def __init__(self, component: Any) -> None:
        self._folder = Path(component.GRADIO_CACHE).resolve()

    def find(self, name: str) -> Path | None:
        """The image at this path; None if it lies elsewhere, or is not there any more."""
        try:
            path = Path(name).resolve()
            is_here = path.is_relative_to(self._folder) and path.is_file()
        except (OSError, ValueError):  # No file can have such a name.
            return None
        return path if is_here else None

    def read(self, value: Mapping[str, Any] | None) -> QuestionBox:
        """Check the question box's content, which Gradio passes on as the browser sent it.

        Raises:
            gradio.Error: an image in it was not uploaded.
        """
        value = value or {}
        names = value.get("files", ())
        images = tuple(filter(None, map(self.find, names)))
        if len(images) < len(names):
            raise not_uploaded()
        return QuestionBox(value.get("text", ""), images)


def not_uploaded() -> Exception:
    """The error for an image that is no upload."""
    return gradio.Error(  # type: ignore[no-any-return]
        "This picture is not here. Upload it again.", duration=5, print_exception=False
    )


async def fetch_nothing(*_: object, **__: object) -> str:
    """Replaces Gradio's download of an address in place of a file, which has no size limit."""
    raise not_uploaded()
