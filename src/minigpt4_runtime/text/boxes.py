"""The boxes that an answer writes as text: `<p>a red ball</p> {<5><6><50><60>}` → values.

Owns   the form of a box in text, and which label belongs to it.
Takes  an answer and the size of its picture; gives Boxes in pixels.
Never  changes the answer, or fails: what is no whole box is only text.
"""

from __future__ import annotations

import re

from minigpt4_runtime.messages import Box

_NUMBERS = r"\s*".join(rf"<\s*(?P<{name}>[0-9]{{1,3}})\s*>" for name in ("x1", "y1", "x2", "y2"))
_PIECES = re.compile(
    r"<p>(?P<label>(?:(?!</?p>).)*)</p>"
    rf"|(?P<box>\{{\s*{_NUMBERS}\s*\}})"
    r"|(?P<delimiter><delim>)"
    r"|[^\s<{]+|\S",
    re.DOTALL,
)


def find_boxes(text: str, size: tuple[int, int]) -> tuple[Box, ...]:
    """All boxes of a text about a picture of this width and height, in their order.

    A label belongs to the boxes that follow it with nothing but space and `<delim>` between. A box
    is four whole numbers from 0 to 100, hundredths of width and height; two opposite corners
    in any order. Pixels are rounded down, as in the original's drawings.
    """
    boxes: list[Box] = []
    label: str | None = None
    for piece in _PIECES.finditer(text):
        if piece["label"] is not None:
            label = piece["label"].strip() or None
        elif piece["box"] and (corners := _corners(piece, size)):
            boxes.append(Box(label, corners, *piece.span()))
        elif not piece["delimiter"]:
            label = None
    return tuple(boxes)


def _corners(piece: re.Match[str], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    (x1, x2), (y1, y2) = (
        sorted(int(piece[name]) for name in names) for names in (("x1", "x2"), ("y1", "y2"))
    )
    if max(x2, y2) > 100:
        return None
    width, height = size
    return x1 * width // 100, y1 * height // 100, x2 * width // 100, y2 * height // 100
