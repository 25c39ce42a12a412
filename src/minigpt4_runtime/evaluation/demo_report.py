"""The report of the demo model's check, with the change since an earlier report.

Owns   the tables and the page.
Takes  a DemoCheck, and an earlier demo.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.demo_cases import Case, SceneAnswer, draw_cases
from minigpt4_runtime.evaluation.demo_check import NEAR, DemoCheck, Score
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.report.files import read_text
from minigpt4_runtime.report.page import Card, thumbnail
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50
Rates = Mapping[str, float]


@dataclass(frozen=True)
class DemoReport:
    """Exact answers by kind of question; `before` are an earlier report's rates by the same names.

    `asked_of` names the model.
    """

    check: DemoCheck
    asked_of: str
    before: Rates | None = None

    @property
    def scores(self) -> dict[str, Score]:
        """By group, then by kind of question."""
        return {**self.check.by_group(), **self.check.by_kind()}

    def table(self) -> Table:
        """A row for each group and each kind."""
        columns = [Column("exactly right"), Column("of"), Column("right"), Column("rate", ".1%")]
        if self.check.has_boxes:
            columns.append(Column(NEAR, ".1%"))
        if self.before is not None:
            columns += [Column("before", ".1%"), Column("points", "+.1f")]
        return Table(
            tuple(columns),
            tuple((name, score.num_asked, score.num_right, score.rate, *self._near(score),
                   *self._change(name, score)) for name, score in self.scores.items()),
            f"{self.check.num_scenes} scenes held out of training (seed {self.check.seed})",
        )  # fmt: skip

    def _near(self, score: Score) -> tuple[float, ...]:
        return (score.near_rate,) if self.check.has_boxes else ()

    def _change(self, name: str, score: Score) -> tuple[float, ...]:
        if self.before is None:
            return ()
        before = self.before[name]
        return before, 100 * (score.rate - before)

    def as_text(self) -> str:
        """The table."""
        return self.table().as_text()

    def as_mapping(self) -> dict[str, Any]:
        """All wrong answers, and all rates."""
        return {"asked_of": self.asked_of, **self.check.as_mapping()}

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("group", "kind", "is_right", "question", "expected", "given")
        rows = (
            (v.group, v.kind, int(v.is_right), v.question, v.expected, v.given)
            for v in self.check.verdicts
        )
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The table, a plot, and the wrong answers with their scenes."""
        from minigpt4_runtime.report.chart import draw

        num_wrong = sum(not verdict.is_right for verdict in self.check.verdicts)
        mistakes = islice(self._mistakes(), _SHOWN_CASES)
        caption = "Share of answers that are right in every character."
        return judged_page(
            "The demo model's answers",
            "The model is asked about drawn scenes that it was not trained on, and an answer "
            f"counts if every character is as it should be. Asked was: {self.asked_of}.",
            tables=[self.table()],
            charts=[draw(f"{caption} Dots: before." if self.before else caption, self._paint)],
            cards=show_cards(mistakes, _card, "What was wrong", f"{num_wrong}"),
        )

    def _paint(self, axes: Axes) -> None:
        names = list(self.scores)
        axes.barh(names, [score.rate for score in self.scores.values()])
        if self.before is not None:
            axes.plot([self.before[name] for name in names], names, "o", color="C1", label="before")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.03), xlabel="rate")

    def _mistakes(self) -> Iterator[tuple[Case, SceneAnswer]]:
        """Each mistake with its case, which is drawn again from the seed."""
        verdicts = iter(self.check.verdicts)
        check = self.check
        for case in draw_cases(check.num_scenes, check.seed, with_boxes=check.has_boxes):
            for verdict in islice(verdicts, len(case.asked)):
                if not verdict.is_right:
                    yield case, verdict


def read_earlier(path: Path, *, num_scenes: int, seed: int) -> Rates:
    """The rates of an earlier report.

    Raises:
        ConfigError: the file is no such report, or is about other scenes.
    """
    try:
        report = json.loads(read_text(path))
        scores = {**report["groups"], **report["kinds"]}
        rates = {name: score["right"] / score["asked"] for name, score in scores.items()}
        scenes = report["num_scenes"], report["seed"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is no demo.json. Give one that `minigpt4 evaluate demo --out` wrote."
        ) from None
    if scenes != (num_scenes, seed):
        raise ConfigError(
            f"{path} is about {scenes[0]} scenes of seed {scenes[1]}, not {num_scenes} of seed "
            f"{seed}. Give the same --scenes and --seed."
        )
    return rates


def _card(mistake: tuple[Case, SceneAnswer]) -> Card:
    case, answer = mistake
    title = " · ".join(dict.fromkeys((answer.group, answer.kind)))
    shown = thumbnail(case.image)
    return question_card(title, answer.question, answer.given, answer.expected, shown)
