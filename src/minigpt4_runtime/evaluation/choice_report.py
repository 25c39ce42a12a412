"""The results of questions with given answers: accuracy by kind, and a page with the wrong ones.

Owns   which of a question's answers counts as chosen.
Takes  questions and how likely their answers are; gives a ChoiceReport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
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


@dataclass(frozen=True)
class ChoiceVerdict:
    """A question and how likely its answers are, in their order."""

    question: ChoiceQuestion
    likelihoods: tuple[Likelihood, ...]

    @property
    def chosen(self) -> int:
        """The answer with the highest log-probability per id, as by SEED-Bench's mean loss."""
        per_id = [each.logprob / each.num_ids for each in self.likelihoods]
        return per_id.index(max(per_id))

    @property
    def chosen_whole(self) -> int:
        """The answer with the highest log-probability as a whole, which favours short ones."""
        whole = [each.logprob for each in self.likelihoods]
        return whole.index(max(whole))


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
    asked = [(q, likelihoods[q.question_id]) for q in questions if q.question_id in likelihoods]
    if not asked:
        raise ConfigError(" ".join(["No question could be asked.", *faults]))
    verdicts = tuple(starmap(ChoiceVerdict, asked))
    return ChoiceReport(verdicts, len(questions) - len(asked), tuple(faults), images_dir)


@dataclass(frozen=True)
class ChoiceReport:
    """Numbers over the questions that were asked."""

    verdicts: tuple[ChoiceVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path

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
            "answers": [
                {
                    **vars(each.question),
                    "chosen": each.chosen,
                    "likelihoods": [vars(one) for one in each.likelihoods],
                }
                for each in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "kind", "right", "chosen", "is_right")
        rows = (
            (v.question.question_id, v.question.image, v.question.text, v.question.kind,
             v.question.choices[v.question.right], v.question.choices[v.chosen],
             int(v.chosen == v.question.right))
            for v in self.verdicts
        )  # fmt: skip
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The accuracy by kind, and the wrong answers."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if verdict.chosen != verdict.question.right]
        return judged_page(
            "Which of the given answers is the likeliest?",
            "Of each question's answers the one counts as chosen whose tokens are the likeliest on "
            "average; beside it is the accuracy if whole answers are compared, and that of "
            "choosing by lot.",
            tables=self.tables(),
            left_out=self.left_out,
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
        title = f"{question.image} · question {question.question_id}"
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
