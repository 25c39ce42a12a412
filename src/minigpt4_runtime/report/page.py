"""A self-contained HTML page, without files from other sites. Reports have no scripts either.

Owns   the parts of a page and their look on phones, on paper and in dark mode (page.html.jinja).
Takes  plain text, tables, charts and images. All text is escaped here.
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
    """A piece of text that is unchanged, removed or added."""

    text: str
    kind: Literal["same", "removed", "added"] = "same"


@dataclass(frozen=True)
class CardText:
    """A labelled text of a card. Example: a run's name and score, and its answer."""

    label: str
    spans: tuple[Span, ...]
    is_best: bool = False


@dataclass(frozen=True)
class Card:
    """A title, labelled texts, and optionally an image as a data URL."""

    title: str
    entries: tuple[CardText, ...]
    image: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Cards under one heading."""

    heading: str
    cards: tuple[Card, ...]


Block = Paragraph | Table | Chart | Gallery


def plain(text: str) -> tuple[Span, ...]:
    """Unchanged text."""
    return (Span(text),)


def thumbnail(image: Image, *, side: int = 360) -> str:
    """A small copy of an RGB image as a data URL."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def render(title: str, blocks: Sequence[Block]) -> str:
    """The whole page."""
    named = [(type(block).__name__.lower(), block) for block in blocks]
    return str(template("page.html.jinja").render(title=title, blocks=named))


@cache
def template(name: str, room: str = "report") -> Any:
    """A template of a room, which may extend `page.html.jinja`: its policy, style and content."""
    jinja2 = require("jinja2", extra="eval")
    rooms = dict.fromkeys((f"minigpt4_runtime.{room}", "minigpt4_runtime.report"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(each, ".") for each in rooms]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)
