"""The results of MME: accuracy and accuracy+ of each task, and their sums.

Owns   the published scores.
Takes  questions and their answers; gives an MmeReport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.asking import Id
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.mme import GROUPS, MmeQuestion, read_answer
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50


@dataclass(frozen=True)
class MmeVerdict:
    """A question and its answer."""

    question: MmeQuestion
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is read as the right one; one that says neither is wrong."""
        return read_answer(self.answer) == self.question.label


@dataclass(frozen=True)
class TaskScore:
    """The numbers of one task: shares of questions and of pictures, and their sum in percent."""

    accuracy: float
    accuracy_plus: float
    num_other: int
    num_pictures: int

    @property
    def score(self) -> float:
        """From 0 to 200."""
        return 100 * (self.accuracy + self.accuracy_plus)


def judge(
    questions: Sequence[MmeQuestion],
    answers: Mapping[Id, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> MmeReport:
    """Count the pictures of which both questions have an answer.

    Raises:
        ConfigError: there is none.
    """
    verdicts: list[MmeVerdict] = []
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        if first.question_id in answers and second.question_id in answers:
            pair = (first, second)
            verdicts += [MmeVerdict(each, answers[each.question_id]) for each in pair]
    if not verdicts:
        raise ConfigError(" ".join(["No picture has both answers.", *faults]))
    return MmeReport(tuple(verdicts), len(questions) - len(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class MmeReport:
    """Numbers over pictures with both answers; the two of a picture follow each other."""

    verdicts: tuple[MmeVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path
    as_published: str = ""

    @property
    def tasks(self) -> dict[str, TaskScore]:
        """The scores of the tasks that were asked."""
        scores = {}
        for task in dict.fromkeys(verdict.question.task for verdict in self.verdicts):
            of_task = [verdict for verdict in self.verdicts if verdict.question.task == task]
            pairs = list(zip(of_task[::2], of_task[1::2], strict=True))
            both = sum(first.is_right and second.is_right for first, second in pairs)
            scores[task] = TaskScore(
                sum(each.is_right for each in of_task) / len(of_task),
                both / len(pairs),
                sum(read_answer(each.answer) == "other" for each in of_task),
                len(pairs),
            )
        return scores

    @property
    def sums(self) -> dict[str, float]:
        """The sums of the groups of which a task was asked."""
        tasks = self.tasks
        asked = {name: [t for t in group if t in tasks] for name, group in GROUPS.items()}
        return {name: sum(tasks[t].score for t in group) for name, group in asked.items() if group}

    def tables(self) -> list[Table]:
        """The tasks, and the sums."""
        columns = (
            Column("task"), Column("accuracy", ".1%"), Column("accuracy+", ".1%"),
            Column("score", ".1f"), Column("neither"), Column("pictures"),
        )  # fmt: skip
        rows = (
            (task, s.accuracy, s.accuracy_plus, s.score, s.num_other, s.num_pictures)
            for task, s in self.tasks.items()
        )
        sums = Table((Column("group"), Column("score", ".1f")), tuple(self.sums.items()))
        return [Table(columns, tuple(rows)), sums]

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **self.sums,
            "tasks": {task: {**vars(s), "score": s.score} for task, s in self.tasks.items()},
            "unanswered": self.num_unanswered,
            "left_out": list(self.left_out),
            "as_published": self.as_published,
            "answers": [
                {**vars(v.question), "answer": v.answer, "read_as": read_answer(v.answer)}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "task", "image", "question", "label", "is_right", "answer")
        rows = ((*vars(v.question).values(), int(v.is_right), v.answer) for v in self.verdicts)
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The scores, and the wrong answers."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if not verdict.is_right]
        return judged_page(
            "Does it answer both questions?",
            "MME asks two questions about each picture, one with yes and one with no for an "
            "answer. Accuracy counts questions, accuracy+ pictures of which both are right, and "
            "the score is the sum of both in percent.",
            tables=self.tables(),
            left_out=self.left_out,
            as_published=self.as_published,
            charts=[draw("The score of each task, of 200.", self._paint_tasks)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Wrong answers", f"{len(wrong)}"),
        )

    def _paint_tasks(self, axes: Axes) -> None:
        tasks = self.tasks
        axes.barh(list(tasks), [score.score for score in tasks.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 200), xlabel="score")

    def _card(self, verdict: MmeVerdict) -> Card:
        question = verdict.question
        shown = find_thumbnail(self.images_dir, question.image)
        return question_card(
            question.question_id, question.text, verdict.answer, question.label, shown
        )
