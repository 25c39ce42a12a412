"""The results of visual question answering: accuracy and a page with the wrong answers.

Owns   how a model's answer is taken before it is compared.
Takes  questions and their answers; gives a VqaReport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.evaluation.asking import pair, share
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.evaluation.vqa import VqaQuestion
from minigpt4_runtime.evaluation.vqa_accuracy import exact_accuracy, vqa_accuracy
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50


@dataclass(frozen=True)
class VqaVerdict:
    """A question and its answer."""

    question: VqaQuestion
    answer: str

    @cached_property
    def accuracy(self) -> float:
        """From 0 to 1: by the answers of several people, or the one right answer."""
        # As MiniGPT-v2's own evaluation takes an answer.
        answer, right = self.answer.lower().replace("<unk>", "").strip(), self.question.right
        return vqa_accuracy(answer, right) if len(right) > 1 else exact_accuracy(answer, right[0])


def judge(
    questions: Sequence[VqaQuestion],
    answers: Mapping[int | str, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> VqaReport:
    """Compare the answers.

    Raises:
        ConfigError: no question has an answer.
    """
    verdicts = tuple(starmap(VqaVerdict, pair(questions, answers, faults)))
    return VqaReport(verdicts, len(questions) - len(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class VqaReport:
    """Numbers over the questions that have an answer."""

    verdicts: tuple[VqaVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path

    @property
    def rates(self) -> dict[str, float | int | None]:
        """The accuracy, and the counts."""
        count = len(self.verdicts)
        return {
            "accuracy": share(sum(verdict.accuracy for verdict in self.verdicts), count),
            "questions": count,
            "unanswered": self.num_unanswered,
            "all_wrong": sum(verdict.accuracy == 0 for verdict in self.verdicts),
        }

    def tables(self) -> list[Table]:
        """The numbers."""
        specs = {"accuracy": ".1%"}
        columns = (Column(name.replace("_", " "), specs.get(name, "")) for name in self.rates)
        return [Table(tuple(columns), (tuple(self.rates.values()),))]

    def as_text(self) -> str:
        """The table."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **self.rates,
            "left_out": list(self.left_out),
            "answers": [
                {**vars(v.question), "answer": v.answer, "accuracy": v.accuracy}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "right", "accuracy", "answer")
        rows = (
            (v.question.question_id, v.question.image, v.question.text, _said(v.question),
             v.accuracy, v.answer)
            for v in self.verdicts
        )  # fmt: skip
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The numbers, how right answers are, and those that are least right."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if verdict.accuracy < 1]
        wrong.sort(key=lambda verdict: verdict.accuracy)
        return judged_page(
            "Does it answer questions about pictures?",
            "An answer is right if three of ten people gave it, and partly right if fewer did; "
            "spelling is made equal before. Where a question has one right answer, it must be that "
            "one.",
            tables=self.tables(),
            left_out=self.left_out,
            charts=[draw("How many answers are how right.", self._paint_accuracies)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Wrong answers", f"{len(wrong)}"),
        )

    def _paint_accuracies(self, axes: Axes) -> None:
        axes.hist([verdict.accuracy for verdict in self.verdicts], bins=10, range=(0, 1))
        axes.set(xlim=(0, 1), xlabel="accuracy", ylabel="answers")

    def _card(self, verdict: VqaVerdict) -> Card:
        question = verdict.question
        title = f"{question.image} · question {question.question_id}"
        shown = find_thumbnail(self.images_dir, question.image)
        return question_card(title, question.text, verdict.answer, _said(question), shown)


def _said(question: VqaQuestion) -> str:
    """What people said, the most frequent first. Example: "dog (7), puppy (3)"."""
    counts = {answer: question.right.count(answer) for answer in question.right}
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    if len(question.right) == 1:
        return question.right[0]
    return ", ".join(f"{answer} ({count})" for answer, count in ordered)
