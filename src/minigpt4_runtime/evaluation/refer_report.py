"""The results of referring expressions: accuracy, overlaps and a page with the boxes.

Owns   what counts as found.
Takes  questions and their answers; gives a ReferReport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.evaluation.asking import pair, share
from minigpt4_runtime.evaluation.images import find_image
from minigpt4_runtime.evaluation.pages import judged_page, show_cards
from minigpt4_runtime.evaluation.refer import Corners, ReferQuestion, overlap, read_box
from minigpt4_runtime.images.drawing import draw_boxes
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import Box, image
from minigpt4_runtime.report.page import Card, CardText, plain, thumbnail
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50
_ENOUGH = 0.5
_SIDE = 480  # Of a picture on the page, in which labels can be read.


@dataclass(frozen=True)
class ReferVerdict:
    """A phrase and its answer."""

    question: ReferQuestion
    answer: str

    @cached_property
    def box(self) -> Corners | None:
        """The answer's box in pixels; None if it does not begin with one."""
        return read_box(self.answer, self.question.size)

    @cached_property
    def overlap(self) -> float:
        """Intersection over union with the right box; 0 without a box."""
        return overlap(self.box, self.question.right) if self.box else 0.0

    @property
    def is_right(self) -> bool:
        """Whether the thing counts as found."""
        return self.overlap > _ENOUGH


def judge(
    questions: Sequence[ReferQuestion],
    answers: Mapping[int | str, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> ReferReport:
    """Measure the answers.

    Raises:
        ConfigError: no question has an answer.
    """
    verdicts = tuple(starmap(ReferVerdict, pair(questions, answers, faults)))
    return ReferReport(verdicts, len(questions) - len(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class ReferReport:
    """Numbers over the phrases that have an answer."""

    verdicts: tuple[ReferVerdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path

    @property
    def rates(self) -> dict[str, float | int | None]:
        """The accuracy, the mean overlap, and how many answers begin with no box."""
        count = len(self.verdicts)
        return {
            "accuracy": share(sum(verdict.is_right for verdict in self.verdicts), count),
            "mean_iou": share(sum(verdict.overlap for verdict in self.verdicts), count),
            "questions": count,
            "unanswered": self.num_unanswered,
            "without_box": sum(verdict.box is None for verdict in self.verdicts),
        }

    def tables(self) -> list[Table]:
        """The numbers."""
        specs = {"accuracy": ".1%", "mean_iou": ".3f"}
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
                {**vars(v.question), "answer": v.answer, "box": v.box, "iou": v.overlap}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each phrase."""
        names = ("question_id", "image", "phrase", "iou", "is_right", "answer")
        rows = (
            (v.question.question_id, v.question.image, v.question.text, v.overlap,
             int(v.is_right), v.answer)
            for v in self.verdicts
        )  # fmt: skip
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The numbers, the spread of overlaps, and the answers that miss, the worst first."""
        from minigpt4_runtime.report.chart import draw

        wrong = [verdict for verdict in self.verdicts if not verdict.is_right]
        wrong.sort(key=lambda verdict: verdict.overlap)
        return judged_page(
            "Does it find what a phrase means?",
            "Each phrase means one thing in its picture. It is found if the answer's box and the "
            "right one have more than half of what they cover together in common (IoU above 0.5). "
            "An answer that does not begin with a box has found nothing.",
            tables=self.tables(),
            left_out=self.left_out,
            charts=[draw("How many answers overlap how much.", self._paint_overlaps)],
            cards=show_cards(wrong[:_SHOWN_CASES], self._card, "Not found", f"{len(wrong)}"),
        )

    def _paint_overlaps(self, axes: Axes) -> None:
        axes.hist([verdict.overlap for verdict in self.verdicts], bins=20, range=(0, 1))
        axes.axvline(_ENOUGH, color="gray")
        axes.set(xlim=(0, 1), xlabel="IoU", ylabel="answers")

    def _card(self, verdict: ReferVerdict) -> Card:
        question = verdict.question
        entry = CardText(f"{question.text} · IoU {verdict.overlap:.2f}", plain(verdict.answer))
        return Card(f"{question.image} · {question.question_id}", (entry,), self._picture(verdict))

    def _picture(self, verdict: ReferVerdict) -> str | None:
        """The picture with the right box and the answer's as a data URL, if it can be read."""
        name = find_image(self.images_dir, verdict.question.image)
        if name is None:
            return None
        try:
            picture = open_rgb(image(self.images_dir / name))
        except ImageError:
            return None
        picture.thumbnail((_SIDE, _SIDE))
        given = {"right": verdict.question.right, "answer": verdict.box}
        boxes = [
            Box(label, _scaled(box, verdict.question.size, picture.size), 0, 0)
            for label, box in given.items()
            if box
        ]
        return thumbnail(draw_boxes(picture, boxes), side=_SIDE)


def _scaled(
    box: Corners, size: tuple[float, float], shown: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box of a picture of that size, within a copy of it of another size."""
    (x1, x2), (y1, y2) = (
        sorted(max(0, min(int(box[at] * shown[axis] / size[axis]), shown[axis])) for at in pair)
        for axis, pair in enumerate(((0, 2), (1, 3)))
    )
    return x1, y1, x2, y2
