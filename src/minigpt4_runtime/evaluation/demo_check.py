"""How often a model is exactly right about drawn scenes that the demo model was never shown.

Owns   the check: which scenes, what is asked about each, and what the counts are called.
Takes  a loaded model; gives a Report.
Never  uses more than the public API, and asks greedily, so that a seed gives the same report.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.messages import Message, image

if TYPE_CHECKING:
    from PIL.Image import Image

    from minigpt4_runtime.api import MiniGPT4

NUM_QUESTIONS = 4


@dataclass(frozen=True)
class Verdict:
    """One question, the answer that counts as right, and the one that was given."""

    group: str  # "descriptions", "answers in a dialogue" or "answers at once".
    kind: str
    question: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        """Whether every character is as it should be."""
        return self.given == self.expected


@dataclass(frozen=True)
class Score:
    """So many right of so many asked."""

    num_right: int
    num_asked: int

    @property
    def rate(self) -> float:
        """The share that is right, from 0 to 1."""
        return self.num_right / self.num_asked if self.num_asked else 0.0


@dataclass(frozen=True)
class Report:
    """What came of a check."""

    num_scenes: int
    seed: int
    verdicts: tuple[Verdict, ...]

    def by_group(self) -> dict[str, Score]:
        """Descriptions, answers further on in a dialogue, and answers to a first question."""
        return _count(self.verdicts, lambda verdict: verdict.group)

    def by_kind(self) -> dict[str, Score]:
        """All answers by the kind of question, descriptions left out."""
        answers = [verdict for verdict in self.verdicts if verdict.group != "descriptions"]
        return dict(sorted(_count(answers, lambda verdict: verdict.kind).items()))

    def as_table(self) -> str:
        """For people to read."""
        lines = [f"{self.num_scenes} scenes nobody trained on (seed {self.seed})", ""]
        lines.append(f"{'exactly right':<26}{'of':>6}{'right':>7}{'rate':>9}")
        lines += [_row(name, score) for name, score in self.by_group().items()]
        lines += ["", "answers by question"]
        lines += [_row(f"  {name}", score) for name, score in self.by_kind().items()]
        return "\n".join(lines)

    def as_mapping(self) -> dict[str, Any]:
        """For programs to read. `mistakes` are all that were wrong."""
        return {
            "num_scenes": self.num_scenes,
            "seed": self.seed,
            "groups": {name: _plain(score) for name, score in self.by_group().items()},
            "kinds": {name: _plain(score) for name, score in self.by_kind().items()},
            "mistakes": [
                {
                    "group": verdict.group,
                    "question": verdict.question,
                    "expected": verdict.expected,
                    "given": verdict.given,
                }
                for verdict in self.verdicts
                if not verdict.is_right
            ],
        }


def check(
    model: MiniGPT4,
    *,
    num_scenes: int = 500,
    seed: int = 0,
    on_scene: Callable[[], None] = lambda: None,
) -> Report:
    """Ask about that many held-out scenes; `on_scene` hears of each that is done.

    The last question of each dialogue is asked once more on its own, as a first question.
    """
    rng = random.Random(seed)
    verdicts: list[Verdict] = []
    for _ in range(num_scenes):
        scene = scenes.random_scene(rng, held_out=True)
        picture = scenes.draw(scene, rng)
        verdicts += talk(model, scene, picture, rng)
        last = verdicts[-1]
        alone = model.describe(picture, last.question).text
        verdicts.append(replace(last, group="answers at once", given=alone))
        on_scene()
    return Report(num_scenes, seed, tuple(verdicts))


def talk(
    model: MiniGPT4, scene: scenes.Scene, picture: Image, rng: random.Random
) -> Iterator[Verdict]:
    """Ask for a description and go on with questions, as people do."""
    wish, expected = scenes.ask_description(rng), scenes.describe(scene)
    dialogue = [Message("user", (image(picture), wish))]
    given = model.chat(dialogue).text
    yield Verdict("descriptions", "description", wish, expected, given)
    for _ in range(NUM_QUESTIONS):
        asked = scenes.ask(scene, rng)
        dialogue += [Message("assistant", (given,)), Message("user", (asked.text,))]
        given = model.chat(dialogue).text
        yield Verdict("answers in a dialogue", asked.kind, asked.text, asked.answer, given)


def _count(verdicts: Sequence[Verdict], name: Callable[[Verdict], str]) -> dict[str, Score]:
    asked = Counter(map(name, verdicts))
    right = Counter(name(verdict) for verdict in verdicts if verdict.is_right)
    return {key: Score(right[key], number) for key, number in asked.items()}


def _row(name: str, score: Score) -> str:
    return f"{name:<26}{score.num_asked:>6}{score.num_right:>7}{score.rate:>9.1%}"


def _plain(score: Score) -> dict[str, float]:
    return {"asked": score.num_asked, "right": score.num_right, "rate": round(score.rate, 4)}
