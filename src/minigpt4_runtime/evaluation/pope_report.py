"""The results of POPE: counts, rates and a page.

Owns   how an answer is read as yes or no, and the counts.
Takes  questions and their answers; gives a PopeReport.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError
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
    reading: str = "first-sentence"

    @property
    def read_as(self) -> Label:
        """The label that the answer counts as."""
        return READINGS[self.reading](self.answer)

    @property
    def is_right(self) -> bool:
        """Whether that is the question's label."""
        return self.read_as == self.question.label


def _read_first_sentence(answer: str) -> Label:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _read_all_words(answer: str) -> Label:
    words = answer.replace(".", "").replace(",", "").split(" ")
    says_no = {"No", "not", "no", "NO"} & set(words) or any(each.endswith("n't") for each in words)
    return "no" if says_no else "yes"


def _read_substring(answer: str) -> Label:
    return "no" if any(part in answer.lower() for part in ("no", "false", "n't")) else "yes"


# How published scripts read an answer. An answer is "no" if
#   first-sentence  its first sentence has the word No, no or not (POPE's own script)
#   all-words       any of its words is No, no, NO or not, or ends in n't (OPERA, PAI)
#   substring       it has "no", "false" or "n't" anywhere, as in "snow" (Nullu)
# and "yes" otherwise.
READINGS: dict[str, Callable[[str], Label]] = {
    "first-sentence": _read_first_sentence,
    "all-words": _read_all_words,
    "substring": _read_substring,
}
_RULES = {
    "first-sentence": "its first sentence has the word no or not",
    "all-words": "any of its words is no or not, or ends in n't",
    "substring": "it has no, false or n't anywhere, within a word too",
}


def is_unclear(answer: str, reading: str = "first-sentence") -> bool:
    """Whether the part that is read says neither yes nor no; such an answer counts as yes."""
    if READINGS[reading](answer) == "no":
        return False
    said = answer.split(".")[0] if reading == "first-sentence" else answer
    return not re.search(r"\b(yes|no|not)\b", said, re.IGNORECASE)


def judge(
    questions: Sequence[PopeQuestion],
    answers: Mapping[int | str, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
    reading: str = "first-sentence",
) -> PopeReport:
    """Count the answers, read in one of READINGS.

    Raises:
        ConfigError: no question has an answer, or there is no such reading.
    """
    if reading not in READINGS:
        raise ConfigError(f"reading is {reading!r}; it must be one of {', '.join(READINGS)}.")
    verdicts = tuple(PopeVerdict(*each, reading) for each in pair(questions, answers, faults))
    return PopeReport(verdicts, len(questions) - len(verdicts), tuple(faults), images_dir, reading)


def _parts(question: PopeQuestion) -> dict[str, int | str]:
    """A question as it is written; its id tells its place in a dialogue."""
    return {name: getattr(question, name) for name in ("question_id", "image", "text", "label")}


@dataclass(frozen=True)
class PopeReport:
    """Counts over the questions that have an answer; "yes" is the positive label."""

    verdicts: tuple[PopeVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path | None
    reading: str = "first-sentence"
    as_published: str = ""

    def count(self, label: Label, read_as: Label) -> int:
        """How many questions with that label have answers that were read as `read_as`."""
        return sum(v.question.label == label and v.read_as == read_as for v in self.verdicts)

    @property
    def num_unclear(self) -> int:
        """How many answers say neither yes nor no; they count as yes."""
        return sum(is_unclear(verdict.answer, self.reading) for verdict in self.verdicts)

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

    @property
    def explanation(self) -> str:
        """What a reader of the page must know."""
        return (
            "POPE asks whether a thing is in the picture; half of the things are not. Precision "
            "falls with every thing that is seen and not there, recall with every thing that is "
            f"overlooked. An answer counts as no if {_RULES[self.reading]}, and as yes otherwise; "
            "unclear ones have neither yes nor no."
        )

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
            "reading": self.reading,
            "questions": len(self.verdicts),
            "unanswered": self.num_unanswered,
            "unclear": self.num_unclear,
            "true_yes": self.count("yes", "yes"),
            "false_yes": self.count("no", "yes"),
            "true_no": self.count("no", "no"),
            "false_no": self.count("yes", "no"),
            "left_out": list(self.left_out),
            "as_published": self.as_published,
            "answers": [
                {**_parts(v.question), "answer": v.answer, "read_as": v.read_as}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "label", "read_as", "is_right", "answer")
        rows = (
            (*_parts(v.question).values(), v.read_as, int(v.is_right), v.answer)
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
            self.explanation,
            tables=self.tables(),
            left_out=self.left_out,
            as_published=self.as_published,
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
