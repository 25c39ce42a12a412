"""The page of an explanation: heat on the pictures, maps, the lens, and what else was likely.

Owns   what the page says and the numbers that its script draws.
Takes  an Explanation; gives HTML, complete in itself.
Never  lets a text of an answer or a prompt act on the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from minigpt4_runtime.lab.explanation import Explanation, Floats, Piece, Word
from minigpt4_runtime.report.page import template, thumbnail

_HERE = Path(__file__).parent
_PICTURE_SIDE = 720
_ANSWER_IN_TITLE = 60
# Below it a probability is shown as "< 0.1 %".
_LEAST_SHOWN = 0.0005


def render(explanation: Explanation) -> str:
    """The whole page.

    Raises:
        BackendUnavailableError: jinja2 is not installed.
    """
    script = (_HERE / "explanation.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    answer = explanation.answer
    shown = answer if len(answer) <= _ANSWER_IN_TITLE else f"{answer[:_ANSWER_IN_TITLE].rstrip()} …"
    return str(template("explanation.html.jinja", "lab").render(
        title=f"How the answer came about: {shown or 'nothing'}",
        digest=digest, script=script, numbers=_numbers(explanation),
        pictures=[thumbnail(each, side=_PICTURE_SIDE) for each in explanation.pictures],
        prompt=explanation.prompt, answer=answer, num_layers=len(explanation.lens) - 1,
        words=list(_words(explanation)),
        pieces=[piece.said.text for piece in explanation.pieces],
        lens=list(_lens(explanation)),
    ))  # fmt: skip


def percent(share: float) -> str:
    """A share as it is shown, on one line. Example: "12.3 %", or "< 0.1 %"."""
    shown = "< 0.1%" if 0 < share < _LEAST_SHOWN else f"{share:.1%}"
    return shown.replace("%", "\u00a0%").replace("< ", "<\u00a0")


def _words(explanation: Explanation) -> Iterator[dict[str, Any]]:
    for word in explanation.words:
        since = explanation.since(word)
        yield {
            "text": word.text,
            "probability": percent(explanation.probability(word)),
            "on_pictures": percent(explanation.on_pictures(word)),
            "since": "–" if since is None else str(since),
            "places": _brightest(explanation, word),
            "pieces": [
                _piece(piece) for piece in explanation.pieces[word.first : word.stop]
            ],
        }  # fmt: skip


def _piece(piece: Piece) -> dict[str, Any]:
    return {
        "text": piece.said.text, "probability": percent(math.exp(piece.said.log_probability)),
        "log": f"{piece.said.log_probability:.2f}".replace("-0.00", "0.00"),
        "others": [
            (each.text, percent(math.exp(each.log_probability)))
            for each in piece.others if each.text != piece.said.text
        ],
    }  # fmt: skip


def _brightest(explanation: Explanation, word: Word) -> str:
    """Where a word looked most, in words."""
    heat = explanation.heat_of(word)[0]
    if not heat.size:
        return ""
    number, row, column = numpy.unravel_index(int(heat.argmax()), heat.shape)
    which = f"picture {number + 1}, " if len(heat) > 1 else ""
    share = percent(float(heat.max()))
    return f"{which}row {row + 1}, column {column + 1} of {heat.shape[1]}: {share}"


def _lens(explanation: Explanation) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """From the last layer to the first, for each id what would have been said there."""
    for number in reversed(range(len(explanation.lens))):
        yield number, [
            {
                "text": guess.text, "share": percent(math.exp(guess.log_probability)),
                "ink": f"{math.exp(guess.log_probability):.2f}",
                "is_said": piece.since is not None and number >= piece.since,
            }
            for guess, piece in zip(explanation.lens[number], explanation.pieces, strict=True)
        ]  # fmt: skip


def _numbers(explanation: Explanation) -> str:
    """What the script draws, as JSON in which no text can end the element that it stands in."""
    numbers = {
        "words": [word.text for word in explanation.words],
        "bands": [f"{each.name} ({each.first}–{each.stop - 1})" for each in explanation.bands],
        "heat": [
            [[_levels(picture) for picture in band] for band in explanation.heat_of(word)]
            for word in explanation.words
        ],
        "looks": _levels(numpy.stack([
            explanation.looks[word.first : word.stop].mean(0) for word in explanation.words
        ])),
        "heads": _levels(explanation.heads),
        "map": _levels(explanation.map),
        "columns": explanation.columns,
        "rows": [piece.said.text for piece in explanation.pieces],
    }  # fmt: skip
    text = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _levels(values: Floats) -> dict[str, Any]:
    """A map (rows, columns) in 256 levels of its largest value: a third of a percent is kept."""
    most = float(values.max(initial=0))
    levels = (values / (most or 1) * 255).round().astype(numpy.uint8)
    return {
        "shape": list(values.shape), "most": round(most, 7),
        "levels": base64.b64encode(levels.tobytes()).decode(),
    }  # fmt: skip
