"""One HTML page that is complete in itself: no script, no font, no picture from elsewhere.

Owns   the parts a page is made of, and how they look (page.html.jinja): on a phone, on paper, in
       the dark.
Takes  plain text, tables, charts and pictures; every text is escaped here and nowhere else.
Never  knows what the numbers mean.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from minigpt4_runtime.optional import require
from minigpt4_runtime.report.table import Table

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "pip install 'minigpt4-runtime[eval]'"
_THUMBNAIL_SIDE = 360


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Chart:
    """A plot as two data URLs; made by `report.chart.draw`."""

    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class Span:
    """A stretch of text: as it was, or left out, or put in."""

    text: str
    kind: Literal["same", "removed", "added"] = "same"


@dataclass(frozen=True)
class Entry:
    """One labelled text of a card. Example: a run's name and score, and its answer."""

    label: str
    spans: tuple[Span, ...]
    is_best: bool = False


@dataclass(frozen=True)
class Card:
    """One case: a title, what was said, and a picture as a data URL, if there is one."""

    title: str
    entries: tuple[Entry, ...]
    picture: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Cards under one heading."""

    heading: str
    cards: tuple[Card, ...]


Block = Paragraph | Table | Chart | Gallery


def plain(text: str) -> tuple[Span, ...]:
    """Text without marks."""
    return (Span(text),)


def thumbnail(picture: Image) -> str:
    """A small copy of an RGB picture as a data URL."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(title: str, blocks: Sequence[Block]) -> str:
    """The whole page."""
    named = [(type(block).__name__.lower(), block) for block in blocks]
    return str(_template().render(title=title, blocks=named))


@cache
def _template() -> Any:
    jinja2 = require("jinja2", install=INSTALL)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minigpt4_runtime.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")
