"""The check of the demo model: exact answers about drawn scenes that it was not trained on.

Owns   the scenes, the questions about each, and the counts.
Takes  a loaded model; gives a DemoCheck. Answers are greedy, so a seed gives the same result.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from PIL.Image import Image

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.messages import Message, image
from minigpt4_runtime.report.ledger import Ledger

NUM_QUESTIONS = 4
LEDGER_KEYS = ("asked_of", "seed", "scene")


@dataclass(frozen=True)
class SceneAnswer:
    """A question, the answer that counts as right, and the answer that was given."""

    group: str  # "descriptions", "answers in a dialogue" or "answers at once".
    kind: str
    question: str
    expected: str
    given: str = ""

    @property
    def is_right(self) -> bool:
        """Whether both are equal in every character."""
        return self.given == self.expected


@dataclass(frozen=True)
class Score:
    """The number of right answers among all answers."""

    num_right: int
    num_asked: int

    @property
    def rate(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.num_right / self.num_asked if self.num_asked else 0.0


@dataclass(frozen=True)
class DemoCheck:
    """The result of a check."""

    num_scenes: int
    seed: int
    verdicts: tuple[SceneAnswer, ...]

    def by_group(self) -> dict[str, Score]:
        """Descriptions, answers later in a dialogue, and answers to a first question."""
        return _count(self.verdicts, lambda verdict: verdict.group)

    def by_kind(self) -> dict[str, Score]:
        """All answers by the kind of question, without descriptions."""
        answers = [verdict for verdict in self.verdicts if verdict.group != "descriptions"]
        return dict(sorted(_count(answers, lambda verdict: verdict.kind).items()))

    def as_table(self) -> str:
        """A table in plain text."""
        lines = [f"{self.num_scenes} scenes held out of training (seed {self.seed})", ""]
        lines.append(f"{'exactly right':<26}{'of':>6}{'right':>7}{'rate':>9}")
        lines += [_row(name, score) for name, score in self.by_group().items()]
        lines += ["", "answers by question"]
        lines += [_row(f"  {name}", score) for name, score in self.by_kind().items()]
        return "\n".join(lines)

    def as_mapping(self) -> dict[str, Any]:
        """The counts as JSON; `mistakes` are all wrong answers."""
        return {
            "num_scenes": self.num_scenes,
            "seed": self.seed,
            "groups": {name: _plain(score) for name, score in self.by_group().items()},
            "kinds": {name: _plain(score) for name, score in self.by_kind().items()},
            "mistakes": [
                {name: value for name, value in vars(verdict).items() if name != "kind"}
                for verdict in self.verdicts
                if not verdict.is_right
            ],
        }


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


def draw_cases(num_scenes: int, seed: int) -> Iterator[SceneCase]:
    """Random cases, the same for the same seed."""
    rng = random.Random(seed)
    return (SceneCase.draw(rng) for _ in range(num_scenes))


def check(
    model: MiniGPT4,
    *,
    num_scenes: int = 500,
    seed: int = 0,
    ledger: Ledger | None = None,
    asked_of: str = "",
    on_scene: Callable[[], None] = lambda: None,
) -> DemoCheck:
    """Ask about that many held-out scenes; `on_scene` is called after each.

    Scenes in the ledger with this seed and `asked_of`, which names the model, are not asked again.
    """
    ledger = ledger or Ledger(None, keys=LEDGER_KEYS)
    verdicts: list[SceneAnswer] = []
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
    return DemoCheck(num_scenes, seed, tuple(verdicts))


def ask(model: MiniGPT4, case: SceneCase) -> list[str]:
    """All answers about one scene, in the order of `SceneCase.asked`."""
    in_dialogue = [verdict.given for verdict in talk(model, case)]
    return [*in_dialogue, model.describe(case.image, case.asked[-1].question).text]


def talk(model: MiniGPT4, case: SceneCase) -> Iterator[SceneAnswer]:
    """Ask for a description, then the questions, in one dialogue."""
    dialogue: list[Message] = []
    for asked in case.asked[:-1]:
        shown = () if dialogue else (image(case.image),)
        dialogue.append(Message("user", (*shown, asked.question)))
        given = model.chat(dialogue).text
        dialogue.append(Message("assistant", (given,)))
        yield replace(asked, given=given)


def _count(verdicts: Sequence[SceneAnswer], name: Callable[[SceneAnswer], str]) -> dict[str, Score]:
    asked = Counter(map(name, verdicts))
    right = Counter(name(verdict) for verdict in verdicts if verdict.is_right)
    return {key: Score(right[key], number) for key, number in asked.items()}


def _row(name: str, score: Score) -> str:
    return f"{name:<26}{score.num_asked:>6}{score.num_right:>7}{score.rate:>9.1%}"


def _plain(score: Score) -> dict[str, float]:
    return {"asked": score.num_asked, "right": score.num_right, "rate": round(score.rate, 4)}
