"""Referring expressions: whether the model finds the thing that a phrase means (RefCOCO).

By Kazemzadeh et al., "ReferItGame", EMNLP 2014, and Yu et al., arXiv:1608.00272.

Owns   the published layout of MiniGPT-v2's files, the reading of a box in an answer, and how much
       two boxes overlap.
Takes  a file of phrases; gives ReferQuestions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import read_json

_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", re.ASCII)

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class ReferQuestion:
    """A phrase, and where its thing is: `right` has left, top, right and bottom in pixels."""

    question_id: str
    image: str
    text: str
    size: tuple[float, float]
    right: Corners


def read_questions(path: Path) -> tuple[ReferQuestion, ...]:
    """Read a file such as refcoco_testA.json: a JSON list, or a record a line.

    Each record has img_id, sents (a phrase, or a list of them), bbox (left, top, width, height),
    width and height. The image is `image`, or img_id without RefCOCO's last number.

    Raises:
        ConfigError: a record has another form, or there is none.
    """
    content = read_json(path)
    records = (
        [(f"Phrase {number} of {path}", record) for number, record in enumerate(content, start=1)]
        if isinstance(content, list)
        else [(f"Line {n} of {path}", record) for n, record in read_json_lines(path, "phrase")]
    )
    found = [each for place, record in records for each in _read(record, place)]
    if not found:
        raise ConfigError(f"{path} holds no phrase.")
    # An id may have several phrases: then they are numbered.
    counts, seen = Counter(each.question_id for each in found), Counter[str]()
    questions = []
    for each in found:
        seen[each.question_id] += 1
        number = f"#{seen[each.question_id]}" if counts[each.question_id] > 1 else ""
        questions.append(replace(each, question_id=each.question_id + number))
    return tuple(questions)


def _read(record: object, place: str) -> list[ReferQuestion]:
    """The phrases of one record; those of one thing have one id."""
    wanted = "A phrase has img_id, sents, bbox, width and height."
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is no object. {wanted}")
    try:
        given_id = str(record["img_id"])
        phrases = record["sents"]
        left, top, width, height = _numbers(record["bbox"], 4)
        size = _numbers([record["width"], record["height"]], 2)
    except KeyError as error:
        raise ConfigError(f"{place} has no {error.args[0]!r}. {wanted}") from None
    except (TypeError, ValueError):
        raise ConfigError(
            f"{place}: bbox must be four numbers, and width and height be numbers above 0."
        ) from None
    phrases = [phrases] if isinstance(phrases, str) else phrases
    if not isinstance(phrases, list) or not all(isinstance(each, str) for each in phrases):
        raise ConfigError(f"{place}: sents must be a phrase or a list of phrases.")
    if min(size) <= 0:
        raise ConfigError(f"{place}: width and height must be above 0.")
    right = (left, top, left + width, top + height)
    name = _image_of(record, given_id)
    return [ReferQuestion(given_id, name, phrase, (size[0], size[1]), right) for phrase in phrases]


def _numbers(given: Any, count: int) -> tuple[float, ...]:
    numbers = tuple(float(each) for each in given)
    if len(numbers) != count:
        raise ValueError
    return numbers


def _image_of(record: Mapping[str, Any], given_id: str) -> str:
    if isinstance(record.get("image"), str):
        return str(record["image"])
    # COCO_train2014_000000581857_16 is the sixteenth thing in COCO_train2014_000000581857.jpg.
    named = re.match(r"COCO_\w+?_\d{12}", given_id)
    return f"{named[0] if named else given_id}.jpg"


def read_box(answer: str, size: tuple[float, float]) -> Corners | None:
    """The box with which an answer begins, in pixels, as MiniGPT-v2's evaluation reads it."""
    found = _BOX.match(answer.replace("<unk>", "").replace(" ", "").strip())
    if not found:
        return None
    (x1, y1, x2, y2), (width, height) = map(int, found.groups()), size
    return x1 / 100 * width, y1 / 100 * height, x2 / 100 * width, y2 / 100 * height


def overlap(one: Corners, other: Corners) -> float:
    """Intersection over union of two boxes, as MiniGPT-v2's evaluation computes it.

    A box from pixel 3 to pixel 5 is 3 pixels wide. With corners in the wrong order it is 0.
    """
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    common = _extent((left, top, right, bottom))
    union = _area(one) + _area(other) - common
    return common / union if union > 0 else 0.0


def _extent(box: Corners) -> float:
    return max(0.0, box[2] - box[0] + 1) * max(0.0, box[3] - box[1] + 1)


def _area(box: Corners) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
