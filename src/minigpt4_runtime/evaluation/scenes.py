"""Drawn scenes, which the demo model is trained on and judged by.

Owns   the scenes of one to four shapes on a 3 × 3 grid, their drawing, their descriptions, and the
       questions about them.
Takes  a random.Random; the same state gives the same scene, image and questions.
"""

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (245, 215, 45),
    "green": (45, 160, 70),
    "blue": (50, 90, 215),
    "purple": (140, 60, 185),
    "pink": (245, 150, 195),
    "brown": (130, 80, 45),
}
SIZES = {"small": 0.22, "large": 0.40}  # Radius, in cells of the grid.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (160, 160, 160),
    "black": (20, 20, 20),
    "beige": (235, 222, 190),
}
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
MAX_SHAPES = 4
SIDE = 384  # Of a drawn image, in pixels, unless another is asked for.
_BESIDE = {
    "left of": "To its left", "right of": "To its right", "above": "Above it", "below": "Below it",
}  # fmt: skip
_NUMBERS = ("no", "one", "two", "three", "four")
_HELD_OUT_OF = 20  # One scene in so many is never trained on.


@dataclass(frozen=True)
class Shape:
    """One drawn shape. `cell` counts the grid's cells row by row, 0 to 8."""

    kind: str
    colour: str
    size: str
    cell: int

    @property
    def phrase(self) -> str:
        """For example: "small red star"."""
        return f"{self.size} {self.colour} {self.kind}"

    @property
    def phrase_with_place(self) -> str:
        """For example: "a small red star in the centre"."""
        return f"a {self.phrase} {PLACES[self.cell]}"


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order on a background."""

    shapes: tuple[Shape, ...]
    background: str

    @property
    def is_held_out(self) -> bool:
        """Whether this scene is kept for judging, decided by a checksum of its description."""
        return zlib.crc32(describe(self).encode()) % _HELD_OUT_OF == 0


@dataclass(frozen=True)
class Question:
    """A question about a scene with the one answer that counts as right.

    `kind` is the sort of question, for example "where".
    """

    text: str
    answer: str
    kind: str


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """A random scene of one to four shapes, held out or not."""
    while True:
        count = rng.randint(1, MAX_SHAPES)
        shapes = tuple(
            Shape(rng.choice(KINDS), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES)), cell)
            for cell in sorted(rng.sample(range(len(PLACES)), count))
        )
        scene = Scene(shapes, rng.choice(tuple(BACKGROUNDS)))
        if scene.is_held_out == held_out:
            return scene


# --- the image --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """The position of a drawn shape, in shares of the image's side."""

    x: float
    y: float
    radius: float


def place_shapes(scene: Scene, rng: random.Random) -> tuple[Outline, ...]:
    """Give every shape its exact place and radius inside its cell."""
    outlines = []
    for shape in scene.shapes:
        radius = SIZES[shape.size] * rng.uniform(0.92, 1.08)
        room = 0.48 - radius
        x, y = (0.5 + rng.uniform(-room, room) for _ in range(2))
        row, column = divmod(shape.cell, 3)
        outlines.append(Outline((column + x) / 3, (row + y) / 3, radius / 3))
    return tuple(outlines)


def draw(
    scene: Scene, rng: random.Random, *, side: int = SIDE, outlines: Sequence[Outline] | None = None
) -> Image.Image:
    """Draw a scene as a square RGB image. Colours and places vary a little."""
    background = _shade(BACKGROUNDS[scene.background], rng)
    drawn = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(drawn)
    for shape, outline in zip(scene.shapes, outlines or place_shapes(scene, rng), strict=True):
        x, y, radius = outline.x * side, outline.y * side, outline.radius * side
        colour = _shade(COLOURS[shape.colour], rng)
        if shape.kind in ("circle", "ring"):
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            canvas.polygon(
                [(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[shape.kind]],
                fill=colour,
            )
        if shape.kind == "ring":
            hole = 0.55 * radius
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    return drawn


def _shade(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, part + rng.randint(-8, 8))) for part in colour)
    return red, green, blue


def _star() -> list[tuple[float, float]]:
    radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return [
        (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)
    ]


def _cross(arm: float = 0.32) -> list[tuple[float, float]]:
    return [
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    ]  # fmt: skip


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": _cross(),
}


def extent(kind: str) -> tuple[float, float, float, float]:
    """How far a shape reaches to the left, top, right and bottom of its middle, in radii."""
    corners = _CORNERS.get(kind, [(-1.0, -1.0), (1.0, 1.0)])
    across, down = zip(*corners, strict=True)
    return min(across), min(down), max(across), max(down)


# --- the words --------------------------------------------------------------------------------


def describe(scene: Scene) -> str:
    """The one right description of a scene."""
    things = _list([shape.phrase_with_place for shape in scene.shapes])
    return (
        f"There {_count(len(scene.shapes), 'shape')} on a {scene.background} background: {things}."
    )


def ask_description(rng: random.Random) -> str:
    """One of the ways to ask for a description."""
    return rng.choice(_DESCRIBE)


def ask(scene: Scene, rng: random.Random) -> Question:
    """A random question about a scene."""
    return rng.choice(_QUESTIONS)(scene, rng)


_DESCRIBE = (
    "Describe this image in detail.",
    "Describe this image.",
    "Describe the picture.",
    "What is in the picture?",
    "What is in this image?",
    "What do you see?",
)


def _list(things: list[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def _plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return noun + ("es" if noun.endswith("ss") else "s")


def _count(count: int, noun: str) -> str:
    return f"{'is' if count == 1 else 'are'} {_NUMBERS[count]} {_plural(noun, count)}"


def _some_noun(scene: Scene, rng: random.Random) -> str:
    """A kind, or colour and kind, that the scene has more often than not."""
    if rng.random() < 0.75:
        shape = rng.choice(scene.shapes)
        kind, colour = shape.kind, shape.colour
    else:
        kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
    return kind if rng.random() < 0.6 else f"{colour} {kind}"


def _matching(scene: Scene, noun: str) -> list[Shape]:
    return [s for s in scene.shapes if noun in (s.kind, f"{s.colour} {s.kind}")]


def _about_one(scene: Scene, noun: str, fact: Callable[[Shape], str]) -> str:
    """The fact about the shape that `noun` names, or their number if there is not just one."""
    found = _matching(scene, noun)
    if len(found) == 1:
        return f"The {noun} is {fact(found[0])}."
    return f"There {_count(len(found), noun)}." if found else f"There is no {noun}."


def _how_many_shapes(scene: Scene, rng: random.Random) -> Question:
    text = rng.choice(("How many shapes are there?", "How many shapes do you see?", "How many?"))
    return Question(text, f"There {_count(len(scene.shapes), 'shape')}.", kind="how many shapes")


def _how_many_of(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.4:
        colour = rng.choice(scene.shapes).colour if rng.random() < 0.7 else rng.choice([*COLOURS])
        noun, count = f"{colour} shape", sum(s.colour == colour for s in scene.shapes)
    else:
        noun = _some_noun(scene, rng)
        count = len(_matching(scene, noun))
    text = rng.choice(("How many {} are there?", "How many {} do you see?"))
    return Question(
        text.format(_plural(noun, 2)), f"There {_count(count, noun)}.", kind="how many of"
    )


def _what_colour(scene: Scene, rng: random.Random) -> Question:
    kind = rng.choice(scene.shapes).kind if rng.random() < 0.8 else rng.choice(KINDS)
    answer = _about_one(scene, kind, lambda shape: shape.colour)
    text = rng.choice(("What colour is the {}?", "What color is the {}?"))
    return Question(text.format(kind), answer, kind="what colour")


def _where(scene: Scene, rng: random.Random) -> Question:
    noun = _some_noun(scene, rng)
    answer = _about_one(scene, noun, lambda shape: PLACES[shape.cell])
    return Question(f"Where is the {noun}?", answer, kind="where")


def _how_big(scene: Scene, rng: random.Random) -> Question:
    noun = _some_noun(scene, rng)
    answer = _about_one(scene, noun, lambda shape: shape.size)
    text = rng.choice(("How big is the {}?", "Is the {} large or small?", "What size is the {}?"))
    return Question(text.format(noun), answer, kind="how big")


def _what_is_at(scene: Scene, rng: random.Random) -> Question:
    cell = rng.choice(scene.shapes).cell if rng.random() < 0.7 else rng.randrange(len(PLACES))
    text = rng.choice(("What is {}?", "What shape is {}?"))
    return Question(
        text.format(PLACES[cell]),
        _name([s for s in scene.shapes if s.cell == cell]),
        kind="what is at",
    )


def _which_is(scene: Scene, rng: random.Random) -> Question:
    colour = rng.choice(scene.shapes).colour if rng.random() < 0.8 else rng.choice([*COLOURS])
    found = [s for s in scene.shapes if s.colour == colour]
    return Question(f"Which shapes are {colour}?", _name(found), kind="which is")


def _what_is_beside(scene: Scene, rng: random.Random) -> Question:
    """The answer begins with the place of the shape, since the rest follows from it."""
    noun, side = _some_noun(scene, rng), rng.choice(tuple(_BESIDE))

    def neighbours(shape: Shape) -> str:
        there = [s.phrase_with_place for s in scene.shapes if _stands(s, side, shape)]
        return f"{PLACES[shape.cell]}. {_BESIDE[side]}: {_list(there) if there else 'nothing'}"

    answer = _about_one(scene, noun, neighbours)
    wording = f"to the {side}" if side.endswith("of") and rng.random() < 0.5 else side
    return Question(f"What is {wording} the {noun}?", answer, kind="what is beside")


def _is_there(scene: Scene, rng: random.Random) -> Question:
    noun = _some_noun(scene, rng) if rng.random() < 0.6 else rng.choice(KINDS)
    found = _matching(scene, noun)
    answer = f"Yes, there {_count(len(found), noun)}." if found else f"No, there is no {noun}."
    article = "an" if noun.startswith("o") else "a"
    return Question(f"Is there {article} {noun}?", answer, kind="is there")


def _what_background(scene: Scene, rng: random.Random) -> Question:
    text = rng.choice(("What colour is the background?", "What color is the background?"))
    return Question(text, f"The background is {scene.background}.", kind="what background")


def _stands(shape: Shape, side: str, other: Shape) -> bool:
    (row, column), (other_row, other_column) = divmod(shape.cell, 3), divmod(other.cell, 3)
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[side]


def _name(shapes: list[Shape]) -> str:
    if not shapes:
        return "Nothing."
    named = _list([f"a {s.phrase}" for s in shapes])
    return f"{named[0].upper()}{named[1:]}."


_QUESTIONS = (
    _how_many_shapes, _how_many_of, _how_many_of, _what_colour, _what_colour, _where, _where,
    _how_big, _what_is_at, _what_is_at, _which_is, _what_is_beside, _what_is_beside,
    _what_is_beside, _is_there, _what_background,
)  # fmt: skip
