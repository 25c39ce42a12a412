"""What a demo model is asked about held-out scenes.

Owns   the scenes, and the questions about each: a dialogue, or one question of each task.
Takes  a random.Random, and a loaded model; gives its answers beside the right ones.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

from PIL.Image import Image

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.evaluation import box_scenes, scenes
from minigpt4_runtime.messages import Message, TaskName, image

NUM_QUESTIONS = 4


@dataclass(frozen=True)
class SceneAnswer:
    """A question, the answer that counts as right, and the answer that was given."""

    group: str  # "descriptions", "answers in a dialogue", "answers at once", or the task.
    kind: str
    question: str
    expected: str
    given: str = ""
    task: TaskName | None = None

    @property
    def is_right(self) -> bool:
        """Whether both are equal in every character."""
        return self.given == self.expected

    @property
    def is_near(self) -> bool:
        """Whether it is right but for boxes, which must overlap the right ones by half."""
        return self.is_right or box_scenes.is_near(self.given, self.expected)


class Case(Protocol):
    """A drawn scene and what is asked about it."""

    @property
    def image(self) -> Image:
        """The drawn scene."""

    @property
    def asked(self) -> tuple[SceneAnswer, ...]:
        """All questions, without answers."""

    def talk(self, model: MiniGPT4) -> Iterator[SceneAnswer]:
        """Ask what one would show of it."""

    def ask(self, model: MiniGPT4) -> list[str]:
        """All answers, in the order of `asked`."""


@dataclass(frozen=True, eq=False)
class SceneCase:
    """A held-out scene, its image, and what is asked about it: a description, then questions."""

    scene: scenes.Scene
    image: Image
    wish: str
    questions: tuple[scenes.Question, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        """Draw a random case."""
        scene = scenes.random_scene(rng, held_out=True)
        drawn, wish = scenes.draw(scene, rng), scenes.ask_description(rng)
        return cls(scene, drawn, wish, tuple(scenes.ask(scene, rng) for _ in range(NUM_QUESTIONS)))

    @property
    def asked(self) -> tuple[SceneAnswer, ...]:
        """A dialogue, then its last question on its own; all without answers."""
        wish = SceneAnswer("descriptions", "description", self.wish, scenes.describe(self.scene))
        further = [SceneAnswer("answers in a dialogue", q.kind, q.text, q.answer)
                   for q in self.questions]  # fmt: skip
        return wish, *further, replace(further[-1], group="answers at once")

    def ask(self, model: MiniGPT4) -> list[str]:
        """All answers, in the order of `asked`."""
        in_dialogue = [verdict.given for verdict in self.talk(model)]
        return [*in_dialogue, model.describe(self.image, self.asked[-1].question).text]

    def talk(self, model: MiniGPT4) -> Iterator[SceneAnswer]:
        """Ask for a description, then the questions, in one dialogue."""
        dialogue: list[Message] = []
        for asked in self.asked[:-1]:
            shown = () if dialogue else (image(self.image),)
            dialogue.append(Message("user", (*shown, asked.question)))
            given = model.chat(dialogue).text
            dialogue.append(Message("assistant", (given,)))
            yield replace(asked, given=given)


@dataclass(frozen=True, eq=False)
class BoxCase:
    """A held-out scene, its image, and a question of each task, all asked at once."""

    image: Image
    asked: tuple[SceneAnswer, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        """Draw a random case."""
        scene = scenes.random_scene(rng, held_out=True)
        outlines = scenes.place_shapes(scene, rng)
        drawn = scenes.draw(scene, rng, outlines=outlines)
        placed = box_scenes.PlacedScene(scene, outlines)
        questions = [box_scenes.ask(placed, task, rng) for task in box_scenes.TASKS]
        asked = [SceneAnswer(q.task, q.kind, q.text, q.answer, task=q.task) for q in questions]
        return cls(drawn, tuple(asked))

    def ask(self, model: MiniGPT4) -> list[str]:
        """All answers, in the order of `asked`."""
        return [verdict.given for verdict in self.talk(model)]

    def talk(self, model: MiniGPT4) -> Iterator[SceneAnswer]:
        """Ask each question on its own."""
        for asked in self.asked:
            reply = model.describe(self.image, asked.question, task=asked.task)
            yield replace(asked, given=reply.text)


def draw_case(rng: random.Random, *, with_boxes: bool) -> Case:
    """A random case for a model that writes boxes, or for one that does not."""
    return BoxCase.draw(rng) if with_boxes else SceneCase.draw(rng)


def draw_cases(num_scenes: int, seed: int, *, with_boxes: bool = False) -> Iterator[Case]:
    """Random cases, the same for the same seed."""
    rng = random.Random(seed)
    return (draw_case(rng, with_boxes=with_boxes) for _ in range(num_scenes))
