"""The results of questions with given answers: accuracy by kind, and a page with the wrong ones.

Owns   which of a question's answers counts as chosen.
Takes  questions and how likely their answers are; gives a ChoiceReport.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.asking import Id, share
from minigpt4_runtime.evaluation.choice import ChoiceQuestion, Likelihood
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50
# An answer that is sure has no loss at all.
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class ChoiceVerdict:
    """A question, its pictures, and how likely its answers are beside each, in their order."""

    question: ChoiceQuestion
    images: tuple[str, ...]
    likelihoods: tuple[tuple[Likelihood, ...], ...]

    @property
    def chosen(self) -> int:
        """The answer with the highest log-probability per id, as by SEED-Bench's mean loss.

        Beside several pictures the one with the highest mean of softmax(1 / loss), as ImageNetVC
        has it; beside one picture that is the same.
        """
        return _likeliest([
            [-1 / min(each.logprob / each.num_ids, -_LEAST_LOSS) for each in answers]
            for answers in self.likelihoods
        ])  # fmt: skip

    @property
    def chosen_whole(self) -> int:
        """The answer that is the likeliest as a whole, which favours short ones."""
        return _likeliest([[each.logprob for each in answers] for answers in self.likelihoods])


def _likeliest(scores: Sequence[Sequence[float]]) -> int:
    """The answer with the highest share, mean over pictures, of their scores' softmax."""
    powers = [[math.exp(score - max(row)) for score in row] for row in scores]
    means = [
        sum(each) for each in zip(*([p / sum(row) for p in row] for row in powers), strict=True)
    ]
    return means.index(max(means))


def judge(
    questions: Sequence[ChoiceQuestion],
    likelihoods: Mapping[Id, tuple[Likelihood, ...]],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> ChoiceReport:
    """Choose the answers.

    Raises:
        ConfigError: no question could be asked.
    """
    wholes: dict[Id, list[ChoiceQuestion]] = {}
    for question in questions:
        wholes.setdefault(question.name, []).append(question)
    verdicts = []
    for parts in wholes.values():
        if asked := [each for each in parts if each.question_id in likelihoods]:
            found = tuple(likelihoods[each.question_id] for each in asked)
            verdicts.append(ChoiceVerdict(asked[0], tuple(each.image for each in asked), found))
    if not verdicts:
        raise ConfigError(" ".join(["No question could be asked.", *faults]))
    missing = len(wholes) - len(verdicts)
    return ChoiceReport(tuple(verdicts), missing, tuple(faults), images_dir)


@dataclass(frozen=True)
class ChoiceReport:
    """Numbers over the questions that were asked."""

    verdicts: tuple[ChoiceVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path
    as_published: str = ""

    @property
    def kinds(self) -> dict[str, tuple[ChoiceVerdict, ...]]:
        """The verdicts by kind of question, in the order of the questions; "all" at the end."""
        names = dict.fromkeys(verdict.question.kind for verdict in self.verdicts)
        by_kind = {
            name: tuple(each for each in self.verdicts if each.question.kind == name)
            for name in names
            if name
        }
        return {**by_kind, "all": self.verdicts}

    def tables(self) -> list[Table]:
        """The accuracy of each kind."""
        columns = (
            Column("kind"), Column("accuracy", ".1%"), Column("by whole answer", ".1%"),
            Column("by chance", ".1%"), Column("questions"),
        )  # fmt: skip
        rows = (
            (name, *_rates(verdicts).values(), len(verdicts))
            for name, verdicts in self.kinds.items()
        )
        return [Table(columns, tuple(rows))]

    def as_text(self) -> str:
        """The table."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **_rates(self.verdicts),
            "kinds": {name: _rates(verdicts) for name, verdicts in self.kinds.items()},
            "questions": len(self.verdicts),
            "unanswered": self.num_unanswered,
            "left_out": list(self.left_out),
            "as_published": self.as_published,
            "answers": [
                {
                    **vars(each.question),
                    "chosen": each.chosen,
                    "pictures": [
                        {"image": name, "likelihoods": [vars(one) for one in answers]}
                        for name, answers in zip(each.images, each.likelihoods, strict=True)
                    ],
                }
                for each in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "kind", "right", "chosen", "is_right")
        rows = (
            (v.question.name, v.question.image, v.question.text, v.question.kind,
             v.question.choices[v.question.right], v.question.choices[v.chosen],
             int(v.chosen == v.question.right))
            for v in self.verdicts
        )  # fmt: skip
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The accuracy by kind, and the wrong answers."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if verdict.chosen != verdict.question.right]
        told = (
            "Of each question's answers the one counts as chosen whose tokens are the likeliest on "
            "average; beside it is the accuracy if whole answers are compared, and that of "
            "choosing by lot."
        )
        if any(len(verdict.images) > 1 for verdict in self.verdicts):
            told += (
                " Beside several pictures it is the one with the highest mean of softmax(1 / loss)."
            )
        return judged_page(
            "Which of the given answers is the likeliest?",
            told,
            tables=self.tables(),
            left_out=self.left_out,
            as_published=self.as_published,
            charts=[draw("The accuracy by kind of question.", self._paint_kinds)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Wrong answers", f"{len(wrong)}"),
        )

    def _paint_kinds(self, axes: Axes) -> None:
        kinds = self.kinds
        axes.barh(list(kinds), [_rates(verdicts)["accuracy"] or 0 for verdicts in kinds.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="accuracy")

    def _card(self, verdict: ChoiceVerdict) -> Card:
        question = verdict.question
        title = f"{question.image} · question {question.name}"
        shown = find_thumbnail(self.images_dir, question.image)
        chosen, right = question.choices[verdict.chosen], question.choices[question.right]
        return question_card(title, question.text, chosen, right, shown)


def _rates(verdicts: Sequence[ChoiceVerdict]) -> dict[str, float | None]:
    count = len(verdicts)
    return {
        "accuracy": share(sum(each.chosen == each.question.right for each in verdicts), count),
        "whole": share(sum(each.chosen_whole == each.question.right for each in verdicts), count),
        "chance": share(sum(1 / len(each.question.choices) for each in verdicts), count),
    }
