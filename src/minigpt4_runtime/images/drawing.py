"""Boxes drawn on their picture, each with its label.

Owns   colours, lines, and where labels stand.
Takes  an RGB picture and Boxes in its pixels; gives a new picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from minigpt4_runtime.messages import Box

# Okabe and Ito's, without black: told apart also by people who cannot tell red from green. Each
# with the colour in which text can be read on it.
_COLOURS = (
    ("#0072B2", "white"), ("#E69F00", "black"), ("#009E73", "white"), ("#CC79A7", "black"),
    ("#56B4E9", "black"), ("#D55E00", "white"), ("#F0E442", "black"),
)  # fmt: skip
# For labels that Pillow's own font cannot write, the first of these on the machine.
_OTHER_FONTS = (
    "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf",
)  # fmt: skip
_LEAST_SIDE = 480  # A smaller picture is enlarged: no label could be read in it.
_LONGEST_LABEL = 40
_MARGIN = 3

Area = tuple[float, float, float, float]


def draw_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The picture with these boxes. Boxes of one label have one colour.

    A box without a label has its number, and so has one whose label no font here can write.
    Labels stand at their boxes where they cover no other label, if there is such a place.
    """
    scale = max(1, -(-_LEAST_SIDE // max(picture.size)))
    drawn = picture.resize((picture.width * scale, picture.height * scale))
    canvas = ImageDraw.Draw(drawn)
    text_size = max(14, max(drawn.size) // 45)
    labels = [_label(number, box, text_size) for number, box in enumerate(boxes, start=1)]
    names = dict.fromkeys(name for name, _ in labels)
    colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(names)}
    areas = [_enlarged(box.box, scale, drawn.size) for box in boxes]
    for (name, _), area in zip(labels, areas, strict=True):
        _draw_lines(canvas, area, drawn.size, colours[name][0])
    taken: list[Area] = []
    for (name, font), area in zip(labels, areas, strict=True):
        place = _place(canvas.textbbox((0, 0), name, font=font), area, drawn.size, taken)
        taken.append(place)
        fill, ink = colours[name]
        canvas.rectangle(place, fill=fill)
        canvas.text((place[0] + _MARGIN, place[1] + _MARGIN), name, ink, font, anchor="lt")
    return drawn


def _draw_lines(
    canvas: ImageDraw.ImageDraw, area: Area, size: tuple[int, int], colour: str
) -> None:
    width = max(2, max(size) // 300)
    # A light line within a dark one is seen on every ground.
    canvas.rectangle(_grown(area, size, width // 2), outline="black", width=width * 2)
    canvas.rectangle(area, outline=colour, width=width)


def _label(number: int, box: Box, size: int) -> tuple[str, Any]:
    """What stands at a box, and the font for it."""
    name = _short(box.label or "")
    font = _font(name, size)
    return (name, font) if name and font else (str(number), ImageFont.load_default(size))


def _enlarged(box: tuple[int, int, int, int], scale: int, size: tuple[int, int]) -> Area:
    (left, right), (top, bottom) = (
        (min(box[axis] * scale, size[axis] - 1), min(box[axis + 2] * scale, size[axis] - 1))
        for axis in (0, 1)
    )
    return left, top, right, bottom


def _short(label: str) -> str:
    name = " ".join(label.split())
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"


def _font(name: str, size: int) -> Any:
    """The first font that has all characters of the name; None if there is none."""
    for font in _fonts(size):
        missing = bytes(font.getmask("\uffff"))
        if all(bytes(font.getmask(each)) != missing for each in name if not each.isspace()):
            return font
    return None


@cache
def _fonts(size: int) -> tuple[Any, ...]:
    fonts: list[Any] = [ImageFont.load_default(size)]
    for file in _OTHER_FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(file, size))
    return tuple(fonts)


def _place(text: Area, box: Area, size: tuple[int, int], taken: Sequence[Area]) -> Area:
    """The first place for a label of this extent that covers no other, or else the best one."""
    width = text[2] - text[0] + 2 * _MARGIN
    height = text[3] - text[1] + 2 * _MARGIN
    places = [_within((x, y, x + width, y + height), size) for x, y in _corners(box, width, height)]
    return min(places, key=lambda place: sum(_common(place, other) for other in taken))


def _corners(box: Area, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Where a label's left upper corner may be: above, below, and inside the box, then beside."""
    left, top, right, bottom = box
    for y in (top - height, bottom, top, bottom - height):
        yield from ((left, y), (right - width, y))
    for row in range(int((bottom - top) / height) + 1):
        yield from ((right, top + row * height), (left - width, top + row * height))


def _within(area: Area, size: tuple[int, int]) -> Area:
    """The area, moved into the picture."""
    left = max(0, min(area[0], size[0] - 1 - (area[2] - area[0])))
    top = max(0, min(area[1], size[1] - 1 - (area[3] - area[1])))
    return left, top, left + area[2] - area[0], top + area[3] - area[1]


def _grown(area: Area, size: tuple[int, int], by: int) -> Area:
    left, top, right, bottom = area
    return max(0, left - by), max(0, top - by), min(size[0], right + by), min(size[1], bottom + by)


def _common(one: Area, other: Area) -> float:
    """The area in which two overlap."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)
