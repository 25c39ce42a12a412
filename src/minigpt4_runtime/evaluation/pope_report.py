"""The results of POPE: counts, rates and a page.

Owns   how an answer is read as yes or no, and the counts.
Takes  questions and their answers; gives a PopeReport.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.evaluation.asking import pair, share
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.evaluation.pope import Label, PopeQuestion
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50


@dataclass(frozen=True)
class PopeVerdict:
    """A question and its answer."""

    question: PopeQuestion
    answer: str

    @property
    def read_as(self) -> Label:
        """The label that the answer counts as."""
        return read_answer(self.answer)

    @property
    def is_right(self) -> bool:
        """Whether that is the question's label."""
        return self.read_as == self.question.label


def read_answer(answer: str) -> Label:
    """Read an answer as POPE's own script does, so that published numbers compare.

    It is "no" if its first sentence has the word No, no or not, and "yes" otherwise.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_unclear(answer: str) -> bool:
    """Whether the first sentence says neither yes nor no; such an answer counts as yes."""
    return not re.search(r"\b(yes|no|not)\b", answer.split(".")[0], re.IGNORECASE)


def judge(
    questions: Sequence[PopeQuestion],
    answers: Mapping[int | str, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> PopeReport:
    """Count the answers.

    Raises:
        ConfigError: no question has an answer.
    """
    verdicts = tuple(starmap(PopeVerdict, pair(questions, answers, faults)))
    return PopeReport(verdicts, len(questions) - len(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class PopeReport:
    """Counts over the questions that have an answer; "yes" is the positive label."""

    verdicts: tuple[PopeVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path

    def count(self, label: Label, read_as: Label) -> int:
        """How many questions with that label have answers that were read as `read_as`."""
        return sum(v.question.label == label and v.read_as == read_as for v in self.verdicts)

    @property
    def num_unclear(self) -> int:
        """How many answers say neither yes nor no; they count as yes."""
        return sum(is_unclear(verdict.answer) for verdict in self.verdicts)

    @property
    def rates(self) -> dict[str, float | None]:
        """The five published numbers, from 0 to 1; None where the divisor is 0."""
        true_yes, false_yes = self.count("yes", "yes"), self.count("no", "yes")
        true_no, false_no = self.count("no", "no"), self.count("yes", "no")
        return {
            "accuracy": share(true_yes + true_no, len(self.verdicts)),
            "precision": share(true_yes, true_yes + false_yes),
            "recall": share(true_yes, true_yes + false_no),
            "f1": share(2 * true_yes, 2 * true_yes + false_yes + false_no),
            "yes_ratio": share(true_yes + false_yes, len(self.verdicts)),
        }

    def tables(self) -> list[Table]:
        """The rates, and the answers by label."""
        rates = Table(
            (*(Column(name.replace("_", " "), ".1%") for name in self.rates),
             Column("questions"), Column("unanswered"), Column("unclear")),
            ((*self.rates.values(), len(self.verdicts), self.num_unanswered, self.num_unclear),),
        )  # fmt: skip
        labels: tuple[Label, Label] = ("yes", "no")
        counts = Table(
            (Column("right is"), Column("read as yes"), Column("read as no")),
            tuple((label, *(self.count(label, read) for read in labels)) for label in labels),
        )
        return [rates, counts]

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **self.rates,
            "questions": len(self.verdicts),
            "unanswered": self.num_unanswered,
            "unclear": self.num_unclear,
            "true_yes": self.count("yes", "yes"),
            "false_yes": self.count("no", "yes"),
            "true_no": self.count("no", "no"),
            "false_no": self.count("yes", "no"),
            "left_out": list(self.left_out),
            "answers": [
                {**vars(v.question), "answer": v.answer, "read_as": v.read_as}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "label", "read_as", "is_right", "answer")
        rows = (
            (*vars(v.question).values(), v.read_as, int(v.is_right), v.answer)
            for v in self.verdicts
        )
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The rates, and the wrong answers, beginning with things that are not in the image."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if not verdict.is_right]
        wrong.sort(key=lambda verdict: verdict.question.label)
        return judged_page(
            "Does it see things that are not there?",
            "POPE asks whether a thing is in the picture; half of the things are not. Precision "
            "falls with every thing that is seen and not there, recall with every thing that is "
            "overlooked. An answer counts as no if its first sentence has the word no or not, and "
            "as yes otherwise; unclear ones have neither yes nor no.",
            tables=self.tables(),
            left_out=self.left_out,
            charts=[draw("The five rates of POPE.", self._paint_rates)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Wrong answers", f"{len(wrong)}"),
        )

    def _paint_rates(self, axes: Axes) -> None:
        names = [name.replace("_", " ") for name in self.rates]
        axes.barh(names, [rate or 0 for rate in self.rates.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="rate")

    def _card(self, verdict: PopeVerdict) -> Card:
        question = verdict.question
        title = f"{question.image} · question {question.question_id}"
        shown = find_thumbnail(self.images_dir, question.image)
        return question_card(title, question.text, verdict.answer, question.label, shown)
