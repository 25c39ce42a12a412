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
from minigpt4_runtime.report.ledger import Ledger

if TYPE_CHECKING:
    from PIL.Image import Image

    from minigpt4_runtime.api import MiniGPT4

NUM_QUESTIONS = 4
LEDGER_KEYS = ("asked_of", "seed", "scene")


@dataclass(frozen=True)
class Verdict:
    """One question, the answer that counts as right, and the one that was given."""

    group: str  # "descriptions", "answers in a dialogue" or "answers at once".
    kind: str
    question: str
    expected: str
    given: str = ""

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


@dataclass(frozen=True, eq=False)
class Case:
    """A held-out scene, its picture, and what is asked about it: a description, then questions."""

    scene: scenes.Scene
    picture: Image
    wish: str
    questions: tuple[scenes.Question, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        """Draw lots for all of it."""
        scene = scenes.random_scene(rng, held_out=True)
        picture = scenes.draw(scene, rng)
        wish = scenes.ask_description(rng)
        return cls(
            scene, picture, wish, tuple(scenes.ask(scene, rng) for _ in range(NUM_QUESTIONS))
        )

    @property
    def asked(self) -> tuple[Verdict, ...]:
        """A dialogue, and its last question once more on its own; nothing is answered yet."""
        wish = Verdict("descriptions", "description", self.wish, scenes.describe(self.scene))
        further = [Verdict("answers in a dialogue", q.kind, q.text, q.answer)
                   for q in self.questions]  # fmt: skip
        return wish, *further, replace(further[-1], group="answers at once")


def draw_cases(num_scenes: int, seed: int) -> Iterator[Case]:
    """The same cases for the same seed."""
    rng = random.Random(seed)
    return (Case.draw(rng) for _ in range(num_scenes))


def check(
    model: MiniGPT4,
    *,
    num_scenes: int = 500,
    seed: int = 0,
    ledger: Ledger | None = None,
    asked_of: str = "",
    on_scene: Callable[[], None] = lambda: None,
) -> Report:
    """Ask about that many held-out scenes; `on_scene` hears of each that is done.

    What the ledger holds of this seed and `asked_of`, which names the model, is not asked again.
    """
    ledger = ledger or Ledger(None, keys=LEDGER_KEYS)
    verdicts: list[Verdict] = []
    for number, case in enumerate(draw_cases(num_scenes, seed)):
        about = {"asked_of": asked_of, "seed": seed, "scene": number}
        record = ledger.find(**about)
        if record is None:
            record = {**about, "given": ask(model, case)}
            ledger.add(record)
        verdicts += [
            replace(asked, given=given)
            for asked, given in zip(case.asked, record["given"], strict=True)
        ]
        on_scene()
    return Report(num_scenes, seed, tuple(verdicts))


def ask(model: MiniGPT4, case: Case) -> list[str]:
    """All answers about one scene, as `Case.asked` has the questions."""
    in_dialogue = [verdict.given for verdict in talk(model, case)]
    return [*in_dialogue, model.describe(case.picture, case.asked[-1].question).text]


def talk(model: MiniGPT4, case: Case) -> Iterator[Verdict]:
    """Ask for a description and go on with questions, as people do."""
    dialogue: list[Message] = []
    for asked in case.asked[:-1]:
        shown = () if dialogue else (image(case.picture),)
        dialogue.append(Message("user", (*shown, asked.question)))
        given = model.chat(dialogue).text
        dialogue.append(Message("assistant", (given,)))
        yield replace(asked, given=given)


def _count(verdicts: Sequence[Verdict], name: Callable[[Verdict], str]) -> dict[str, Score]:
    asked = Counter(map(name, verdicts))
    right = Counter(name(verdict) for verdict in verdicts if verdict.is_right)
    return {key: Score(right[key], number) for key, number in asked.items()}


def _row(name: str, score: Score) -> str:
    return f"{name:<26}{score.num_asked:>6}{score.num_right:>7}{score.rate:>9.1%}"


def _plain(score: Score) -> dict[str, float]:
    return {"asked": score.num_asked, "right": score.num_right, "rate": round(score.rate, 4)}
