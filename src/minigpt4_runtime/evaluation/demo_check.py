"""The check of the demo model: exact answers about drawn scenes that it was not trained on.

Owns   the counts of what is right.
Takes  a loaded model; gives a DemoCheck. Answers are greedy, so a seed gives the same result.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.evaluation.demo_cases import SceneAnswer, draw_cases
from minigpt4_runtime.report.ledger import Ledger

LEDGER_KEYS = ("asked_of", "seed", "scene")
NEAR = "IoU ≥ 0.5"


@dataclass(frozen=True)
class Score:
    """The number of right answers among all answers.

    `num_near` counts also those whose boxes are only about right.
    """

    num_right: int
    num_asked: int
    num_near: int

    @property
    def rate(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.num_right / self.num_asked if self.num_asked else 0.0

    @property
    def near_rate(self) -> float:
        """The share of answers with the right words and with boxes that overlap by half."""
        return self.num_near / self.num_asked if self.num_asked else 0.0


@dataclass(frozen=True)
class DemoCheck:
    """The result of a check. `has_boxes`: it was of a model that writes boxes."""

    num_scenes: int
    seed: int
    verdicts: tuple[SceneAnswer, ...]
    has_boxes: bool = False

    def by_group(self) -> dict[str, Score]:
        """Descriptions, answers in a dialogue, and answers to a first question; or by task."""
        return _count(self.verdicts, lambda verdict: verdict.group)

    def by_kind(self) -> dict[str, Score]:
        """All answers by the kind of question, without descriptions and what is one with a task."""
        answers = [v for v in self.verdicts if v.kind not in (v.group, "description")]
        return dict(sorted(_count(answers, lambda verdict: verdict.kind).items()))

    def as_table(self) -> str:
        """A table in plain text."""
        lines = [f"{self.num_scenes} scenes held out of training (seed {self.seed})", ""]
        near = f"{NEAR:>12}" if self.has_boxes else ""
        lines.append(f"{'exactly right':<26}{'of':>6}{'right':>7}{'rate':>9}{near}")
        lines += [self._row(name, score) for name, score in self.by_group().items()]
        lines += ["", "answers by question"]
        lines += [self._row(f"  {name}", score) for name, score in self.by_kind().items()]
        return "\n".join(lines)

    def _row(self, name: str, score: Score) -> str:
        near = f"{score.near_rate:>12.1%}" if self.has_boxes else ""
        return f"{name:<26}{score.num_asked:>6}{score.num_right:>7}{score.rate:>9.1%}{near}"

    def as_mapping(self) -> dict[str, Any]:
        """The counts as JSON; `mistakes` are all wrong answers."""
        return {
            "num_scenes": self.num_scenes,
            "seed": self.seed,
            "groups": {name: self._plain(score) for name, score in self.by_group().items()},
            "kinds": {name: self._plain(score) for name, score in self.by_kind().items()},
            "mistakes": [
                {name: value for name, value in vars(verdict).items()
                 if name not in ("kind", "task")}
                for verdict in self.verdicts
                if not verdict.is_right
            ],
        }  # fmt: skip

    def _plain(self, score: Score) -> dict[str, float]:
        near = {"near": score.num_near} if self.has_boxes else {}
        plain = {"asked": score.num_asked, "right": score.num_right, "rate": round(score.rate, 4)}
        return {**plain, **near}


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

    A model that writes boxes is asked for them. Scenes in the ledger with this seed and `asked_of`,
    which names the model, are not asked again.
    """
    ledger = ledger or Ledger(None, keys=LEDGER_KEYS)
    verdicts: list[SceneAnswer] = []
    for number, case in enumerate(draw_cases(num_scenes, seed, with_boxes=model.has_boxes)):
        about = {"asked_of": asked_of, "seed": seed, "scene": number}
        record = ledger.find(**about)
        if record is None:
            record = {**about, "given": case.ask(model)}
            ledger.add(record)
        verdicts += [
            replace(asked, given=given)
            for asked, given in zip(case.asked, record["given"], strict=True)
        ]
        on_scene()
    return DemoCheck(num_scenes, seed, tuple(verdicts), model.has_boxes)


def _count(verdicts: Sequence[SceneAnswer], name: Callable[[SceneAnswer], str]) -> dict[str, Score]:
    asked = Counter(map(name, verdicts))
    right = Counter(name(verdict) for verdict in verdicts if verdict.is_right)
    near = Counter(name(verdict) for verdict in verdicts if verdict.is_near)
    return {key: Score(right[key], number, near[key]) for key, number in asked.items()}
