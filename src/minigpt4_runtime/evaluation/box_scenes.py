"""Questions about drawn scenes that name parts of the picture as boxes.

Owns   the boxes of drawn shapes, the questions of MiniGPT-v2's tasks about a scene, and their one
       right answer each.
Takes  a scene with its outlines, and a random.Random: the same state gives the same questions.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.evaluation.refer import overlap
from minigpt4_runtime.evaluation.scenes import Outline, Scene, Shape
from minigpt4_runtime.messages import TaskName

# Left, top, right and bottom in hundredths of the picture's width and height.
Corners = tuple[int, int, int, int]

# Wordings of MiniGPT-v2's own training (upstream: datasets/coco_caption.py, refcoco.py).
_REFER = ("{}", "give me the location of {}", "where is {} ?", "the location of {} is")
_IDENTIFY = ("{}", "what object is in this location {}", "what is it in {}")
_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", re.ASCII)
_LEAST_OVERLAP = 0.5  # Of two boxes of one thing, as in RefCOCO's accuracy.
_MAX_SHIFT = 2  # A box that is asked about may be this far off, in hundredths.


@dataclass(frozen=True)
class PlacedScene:
    """A scene, and where exactly its shapes are drawn."""

    scene: Scene
    outlines: tuple[Outline, ...]

    @property
    def boxes(self) -> tuple[Corners, ...]:
        """The boxes of the shapes, in their order."""
        return tuple(
            corners_of(shape, outline)
            for shape, outline in zip(self.scene.shapes, self.outlines, strict=True)
        )


@dataclass(frozen=True)
class BoxQuestion:
    """A question of one task, and its right answer. `kind` is the task, or the sort of [vqa]."""

    task: TaskName
    text: str
    answer: str
    kind: str


def corners_of(shape: Shape, outline: Outline) -> Corners:
    """The smallest box around a drawn shape."""
    left, top, right, bottom = scenes.extent(shape.kind)
    x, y, radius = outline.x, outline.y, outline.radius
    return (
        round(100 * (x + left * radius)), round(100 * (y + top * radius)),
        round(100 * (x + right * radius)), round(100 * (y + bottom * radius)),
    )  # fmt: skip


def write_box(corners: Corners) -> str:
    """As MiniGPT-v2 writes it: `{<5><6><50><60>}`."""
    return "{" + "".join(f"<{number}>" for number in corners) + "}"


def is_near(given: str, right: str) -> bool:
    """Whether an answer has the right words, and each box overlaps the right one by half."""
    boxes, right_boxes = _read_boxes(given), _read_boxes(right)
    return (
        _BOX.sub("{}", given) == _BOX.sub("{}", right)
        and len(boxes) == len(right_boxes)
        and all(map(_overlaps, boxes, right_boxes))
    )


def _read_boxes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, found.groups())) for found in _BOX.finditer(text)]


def _overlaps(given: tuple[int, ...], right: tuple[int, ...]) -> bool:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = (
        (number / 100 * scenes.SIDE for number in box) for box in (given, right)
    )
    return overlap((x1, y1, x2, y2), (u1, v1, u2, v2)) >= _LEAST_OVERLAP


def ask(placed: PlacedScene, task: TaskName, rng: random.Random) -> BoxQuestion:
    """A random question of a task about a scene."""
    if task == "vqa":
        question = scenes.ask(placed.scene, rng)
        return BoxQuestion(task, question.text, question.answer, question.kind)
    text, answer = _QUESTIONS[task](placed, rng)
    return BoxQuestion(task, text, answer, task)


def _refer(placed: PlacedScene, rng: random.Random) -> tuple[str, str]:
    index = rng.randrange(len(placed.boxes))
    phrase = rng.choice(_REFER).format(f"the {_name(placed.scene, index, rng)}")
    return phrase, write_box(placed.boxes[index])


def _name(scene: Scene, index: int, rng: random.Random) -> str:
    """A phrase that only this shape of the scene answers to."""
    shape = scene.shapes[index]
    where = f"{shape.phrase} {scenes.PLACES[shape.cell]}"
    several = [shape.kind, f"{shape.colour} {shape.kind}", f"{shape.size} {shape.kind}",
               f"{shape.colour} shape", shape.phrase]  # fmt: skip
    alone = [phrase for phrase in several if len(_answering(scene, phrase)) == 1]
    return rng.choice(alone) if alone else where


def _answering(scene: Scene, phrase: str) -> list[int]:
    """The shapes that have every word of a phrase."""
    wanted = set(phrase.split()) - {"shape", "shapes"}
    return [i for i, shape in enumerate(scene.shapes) if wanted <= set(shape.phrase.split())]


def _detection(placed: PlacedScene, rng: random.Random) -> tuple[str, str]:
    """What is named; of all shapes, or with a wish for a description, each by its own name."""
    scene = placed.scene
    if rng.random() < 0.4:
        text = "shapes" if rng.random() < 0.3 else scenes.ask_description(rng)
        return text, " ".join(
            f"<p>{shape.phrase}</p> {write_box(box)}"
            for shape, box in zip(scene.shapes, placed.boxes, strict=True)
        )
    source = rng.choice(scene.shapes)
    kind = rng.choice(scenes.KINDS) if rng.random() < 0.1 else source.kind
    phrase = rng.choice((kind, kind, f"{source.colour} {kind}", f"{source.colour} shape"))
    boxes = [write_box(placed.boxes[i]) for i in _answering(scene, phrase)]
    found = f"<p>{phrase}</p> {'<delim>'.join(boxes)}"
    return phrase, found if boxes else f"There is no {phrase}."


def _identify(placed: PlacedScene, rng: random.Random) -> tuple[str, str]:
    index = rng.randrange(len(placed.boxes))
    left, top, right, bottom = (
        min(100, max(0, number + rng.randint(-_MAX_SHIFT, _MAX_SHIFT)))
        for number in placed.boxes[index]
    )
    asked = rng.choice(_IDENTIFY).format(write_box((left, top, right, bottom)))
    return asked, placed.scene.shapes[index].phrase


def _grounding(placed: PlacedScene, rng: random.Random) -> tuple[str, str]:
    """The description, with a box behind each shape."""
    answer, end = scenes.describe(placed.scene), ""
    for shape, box in zip(placed.scene.shapes, placed.boxes, strict=True):
        name = f"a {shape.phrase}"
        before, answer = answer.split(name, 1)
        end += f"{before}<p>{name}</p> {write_box(box)}"
    return scenes.ask_description(rng), end + answer


def _caption(placed: PlacedScene, rng: random.Random) -> tuple[str, str]:
    return scenes.ask_description(rng), scenes.describe(placed.scene)


_QUESTIONS: dict[TaskName, Callable[[PlacedScene, random.Random], tuple[str, str]]] = {
    "refer": _refer,
    "detection": _detection,
    "identify": _identify,
    "grounding": _grounding,
    "caption": _caption,
}
TASKS: Sequence[TaskName] = (*_QUESTIONS, "vqa")
