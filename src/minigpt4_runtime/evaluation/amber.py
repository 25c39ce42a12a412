"""AMBER: pictures to describe, and yes-or-no questions about them.

By Wang et al., "An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
arXiv:2311.07397.

Owns   the published layouts of queries, answers and annotations, and the numbers of the questions.
Takes  files; gives AmberQuestions, answers as its script takes them, and an AmberReport.
Never  judges descriptions: that needs AMBER's own lists of words and word vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.asking import Id, pair, read_json, share
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The script's names of kinds, by what its tables call them; any other kind is a relation.
_DIMENSIONS = {"discriminative-hallucination": "existence", "discriminative-attribute": "attribute"}
_NUM_DESCRIPTIONS = 1004  # Ids up to this are descriptions, as its README says.
_SHOWN_CASES = 50


@dataclass(frozen=True)
class AmberQuestion:
    """A line of query_all.json. A description's `text` asks for it."""

    question_id: int
    image: str
    text: str

    @property
    def is_description(self) -> bool:
        """Whether a description is wanted, and not yes or no."""
        return self.question_id <= _NUM_DESCRIPTIONS


def read_questions(path: Path) -> tuple[AmberQuestion, ...]:
    """Read query_all.json or one of its parts.

    Raises:
        ConfigError: it has another layout, or an id comes twice.
    """
    content = read_json(path)
    records = content if isinstance(content, list) else []
    questions: dict[int, AmberQuestion] = {}
    for number, record in enumerate(records, start=1):
        given = record if isinstance(record, dict) else {}
        question_id, name, text = (given.get(key) for key in ("id", "image", "query"))
        if type(question_id) is not int or not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f"Query {number} of {path} lacks an id, an image or a query.")
        if question_id in questions:
            raise ConfigError(f"Query {number} of {path}: id {question_id} comes twice.")
        questions[question_id] = AmberQuestion(question_id, name, text)
    if not questions:
        raise ConfigError(f"{path} holds no query. Give AMBER's query_all.json or a part of it.")
    return tuple(questions.values())


def read_answer(answer: str) -> str:
    """Yes or No, by the first of these words in the answer; without one the answer as it is.

    AMBER's script takes only these two words to the letter, and leaves to its users how to get
    them.
    """
    said = re.search(r"\b(yes|no)\b", answer, re.IGNORECASE)
    return said[0].capitalize() if said else answer


def as_responses(
    questions: Sequence[AmberQuestion], answers: Mapping[Id, str]
) -> list[dict[str, int | str]]:
    """The answers as AMBER's script reads them."""
    return [
        {
            "id": each.question_id,
            "response": answers[each.question_id]
            if each.is_description
            else read_answer(answers[each.question_id]),
        }
        for each in questions
        if each.question_id in answers
    ]


@dataclass(frozen=True)
class AmberVerdict:
    """A yes-or-no question, its answer, and what is right."""

    question: AmberQuestion
    answer: str
    label: Literal["Yes", "No"]
    dimension: str

    @property
    def read_as(self) -> str:
        """Yes, No, or an answer that is neither and always wrong."""
        return read_answer(self.answer)


def judge(
    questions: Sequence[AmberQuestion],
    answers: Mapping[Id, str],
    annotations: Path,
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> AmberReport:
    """Score the yes-or-no questions by AMBER's annotations.json.

    Raises:
        ConfigError: the file has another layout, or there is no such question with an answer.
    """
    content = read_json(annotations)
    records = content if isinstance(content, list) else []
    truths = {each.get("id"): each for each in records if isinstance(each, dict)}
    verdicts = []
    asked = [each for each in questions if not each.is_description]
    for question, answer in pair(asked, answers, faults):
        truth = truths.get(question.question_id, {})
        if truth.get("truth") not in ("yes", "no"):
            raise ConfigError(f"{annotations} has no yes or no for id {question.question_id}.")
        kind = str(truth.get("type"))
        named = (name for start, name in _DIMENSIONS.items() if kind.startswith(start))
        label: Literal["Yes", "No"] = "Yes" if truth["truth"] == "yes" else "No"
        verdicts.append(AmberVerdict(question, answer, label, next(named, "relation")))
    return AmberReport(tuple(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class AmberReport:
    """Rates of the yes-or-no questions; "No" is the positive label, as in AMBER's script."""

    verdicts: tuple[AmberVerdict, ...]
    left_out: tuple[str, ...]
    images_dir: Path

    def rates(self, dimension: str | None = None) -> dict[str, float | int | None]:
        """Accuracy, precision, recall and F1 of a dimension, or of all."""
        those = [each for each in self.verdicts if dimension in (None, each.dimension)]
        said, there = (
            [each for each in those if getattr(each, name) == "No"] for name in ("read_as", "label")
        )
        right_no = sum(each.read_as == each.label == "No" for each in those)
        return {
            "accuracy": share(sum(each.read_as == each.label for each in those), len(those)),
            "precision": share(right_no, len(said)),
            "recall": share(right_no, len(there)),
            "f1": share(2 * right_no, len(said) + len(there)),
            "questions": len(those),
            "neither": sum(each.read_as not in ("Yes", "No") for each in those),
        }

    @property
    def dimensions(self) -> dict[str, dict[str, float | int | None]]:
        """The rates by dimension, all first."""
        names = dict.fromkeys(each.dimension for each in self.verdicts)
        return {"all": self.rates(), **{name: self.rates(name) for name in names}}

    def table(self) -> Table:
        """A row for each dimension."""
        rates = ("accuracy", "precision", "recall", "f1")
        columns = (
            Column("dimension"), *(Column(name, ".1%") for name in rates), Column("questions"),
            Column("neither"),
        )  # fmt: skip
        return Table(columns, tuple((n, *row.values()) for n, row in self.dimensions.items()))

    def as_text(self) -> str:
        """The table."""
        return self.table().as_text()

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        rows = self.as_rows()
        names = [column.name for column in rows.columns]
        return {
            "dimensions": self.dimensions,
            "left_out": list(self.left_out),
            "answers": [dict(zip(names, row, strict=True)) for row in rows.rows],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("id", "image", "query", "dimension", "label", "read_as", "answer")
        rows = (
            (*vars(v.question).values(), v.dimension, v.label, v.read_as, v.answer)
            for v in self.verdicts
        )
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The rates, and the wrong answers."""
        from minigpt4_runtime.report.chart import draw

        wrong = [each for each in self.verdicts if each.read_as != each.label]
        return judged_page(
            "Does it see what is not there?",
            "AMBER's yes-or-no questions. No is the positive label: precision is the share of the "
            "answers no that are right, recall that of the things not there that are denied.",
            tables=[self.table()],
            left_out=self.left_out,
            charts=[draw("F1 of each dimension.", self._paint)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Wrong answers", f"{len(wrong)}"),
        )

    def _paint(self, axes: Axes) -> None:
        axes.barh(list(self.dimensions), [row["f1"] or 0 for row in self.dimensions.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="F1")

    def _card(self, verdict: AmberVerdict) -> Card:
        question = verdict.question
        shown = find_thumbnail(self.images_dir, question.image)
        title = f"{question.image} · {question.question_id}"
        return question_card(title, question.text, verdict.answer, verdict.label, shown)
