"""CLIP scores of answers: how well they fit their images. Higher is better.

Owns   the score of an answer, which is the cosine between its embedding and its image's; the
       comparison of runs; and their report.
Takes  a LineUp, a Judge and a Ledger of scores; gives a ClipReport.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.evaluation.answers import Case, LineUp
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, show_cards
from minigpt4_runtime.evaluation.statistics import PairedComparison
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import image
from minigpt4_runtime.report.ledger import Ledger
from minigpt4_runtime.report.page import Card, CardText, Chart, plain
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from minigpt4_runtime.evaluation.judge import Judge

LEDGER_KEYS = ("judge", "picture", "answer")
_AT_ONCE = 8
_DECIMALS = 6  # Further digits depend on the rest of the batch; equal answers must tie.
_SHOWN_CASES = 100


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, its score, and whether it was longer than the judge reads."""

    text: str
    score: float
    is_cut: bool


@dataclass(frozen=True)
class ScoredCase:
    """An image and its scored answers, one for each run."""

    name: str
    answers: tuple[ScoredAnswer, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """One for each run."""
        return tuple(answer.score for answer in self.answers)

    @property
    def gap(self) -> float:
        """The difference between the best and the worst answer."""
        return max(self.scores) - min(self.scores)


def score(
    those: LineUp,
    judge: Judge,
    ledger: Ledger,
    *,
    images_dir: Path,
    on_image: Callable[[], None] = lambda: None,
) -> ClipReport:
    """Score every answer that is not in the ledger. `on_image` is called after each image.

    Raises:
        ConfigError: none of the images can be read.
    """
    scored: list[ScoredCase] = []
    left_out = list(those.left_out)
    for first in range(0, len(those.cases), _AT_ONCE):
        some = those.cases[first : first + _AT_ONCE]
        images: dict[Case, Image] = {}
        for case in some:
            try:
                images[case] = open_rgb(image(images_dir / case.name))
            except ImageError as error:
                left_out.append(str(error))
        scored += _score_some(images, judge, ledger)
        for _ in some:
            on_image()
    if not scored:
        raise ConfigError(" ".join(["No picture could be judged.", *left_out]))
    return ClipReport(those.runs, tuple(scored), tuple(left_out), images_dir, judge.max_tokens)


def _score_some(images: Mapping[Case, Image], judge: Judge, ledger: Ledger) -> list[ScoredCase]:
    """Score the cases of one batch, of which the judge sees only those with new answers."""
    digests = {case: _digest(each) for case, each in images.items()}

    def find(case: Case, text: str) -> dict[str, Any] | None:
        return ledger.find(judge=judge.digest, picture=digests[case], answer=text)

    remaining = [case for case in images if not all(find(case, each.text) for each in case.answers)]
    image_rows = (
        judge.embed_images([images[case] for case in remaining]).numpy() if remaining else ()
    )
    for case, image_row in zip(remaining, image_rows, strict=True):
        texts = [answer.text for answer in case.answers]
        text_rows, lengths = judge.embed_texts(texts).numpy(), judge.count_tokens(texts)
        for text, text_row, length in zip(texts, text_rows, lengths, strict=True):
            if find(case, text) is None:
                ledger.add({
                    "image": case.name, "judge": judge.digest, "picture": digests[case],
                    "answer": text, "score": round(float(image_row @ text_row), _DECIMALS),
                    "is_cut": length > judge.max_tokens,
                })  # fmt: skip
    return [
        ScoredCase(case.name, tuple(
            ScoredAnswer(answer.text, record["score"], record["is_cut"])
            for answer in case.answers if (record := find(case, answer.text))
        ))
        for case in images
    ]  # fmt: skip


def _digest(rgb: Image) -> str:
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()


@dataclass(frozen=True)
class ClipReport:
    """The scores. Every run after the first is compared with the first."""

    runs: tuple[str, ...]
    cases: tuple[ScoredCase, ...]
    left_out: tuple[str, ...]
    images_dir: Path
    max_tokens: int

    @property
    def means(self) -> tuple[float, ...]:
        """Each run's mean score."""
        return tuple(numpy.mean([case.scores for case in self.cases], axis=0).tolist())

    @property
    def num_cut(self) -> tuple[int, ...]:
        """For each run, how many answers were longer than the judge reads."""
        flags = [[answer.is_cut for answer in case.answers] for case in self.cases]
        return tuple(numpy.sum(flags, axis=0).tolist())

    @cached_property
    def comparisons(self) -> dict[str, PairedComparison]:
        """Each further run compared with the first."""
        return {
            run: PairedComparison.of(self.differences(index))
            for index, run in enumerate(self.runs)
            if index
        }

    def differences(self, index: int) -> list[float]:
        """For each image, the run's score less that of the first run."""
        return [round(case.scores[index] - case.scores[0], _DECIMALS) for case in self.cases]

    @property
    def widest_first(self) -> list[ScoredCase]:
        """The images on which runs differ most; of a single run, the worst answers."""
        if len(self.runs) == 1:
            return sorted(self.cases, key=lambda case: case.scores[0])
        return sorted(self.cases, key=lambda case: -case.gap)

    def tables(self) -> list[Table]:
        """Means, then comparisons."""
        cut = f"over {self.max_tokens} tokens"
        columns = Column("run"), Column("mean", ".4f"), Column("pictures"), Column(cut)
        means = tuple(
            (run, each["mean"], each["pictures"], each["cut"])
            for run, each in self._summaries().items()
        )
        return [Table(columns, means), *([self._comparison_table()] if self.comparisons else [])]

    def _summaries(self) -> dict[str, dict[str, float]]:
        return {
            run: {"mean": mean, "pictures": len(self.cases), "cut": cut}
            for run, mean, cut in zip(self.runs, self.means, self.num_cut, strict=True)
        }

    def _comparison_table(self) -> Table:
        columns = (
            Column(f"against {self.runs[0]}"),
            *(Column(name) for name in ("wins", "ties", "losses")),
            *(Column(name, "+.4f") for name in ("mean difference", "95 % from", "to")),
        )
        rows = tuple((run, *vars(each).values()) for run, each in self.comparisons.items())
        return Table(columns, rows)

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            "runs": self._summaries(),
            "against": self.runs[0],
            "comparisons": {run: vars(each) for run, each in self.comparisons.items()},
            "max_tokens": self.max_tokens,
            "left_out": list(self.left_out),
            "pictures": {
                case.name: {
                    run: vars(answer) for run, answer in zip(self.runs, case.answers, strict=True)
                }
                for case in self.cases
            },
        }

    def as_rows(self) -> Table:
        """One row for each answer."""
        names = ("image", "run", "score", "is_cut", "answer")
        rows = (
            (case.name, run, answer.score, int(answer.is_cut), answer.text)
            for case in self.cases
            for run, answer in zip(self.runs, case.answers, strict=True)
        )
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """Means, plots, and the images on which runs differ most."""
        return judged_page(
            "How well the answers fit their pictures",
            "A CLIP model scored each answer against its picture: the cosine between the two, "
            f"higher is better. It reads {self.max_tokens} tokens of an answer, and longer ones "
            "are cut. Intervals are 95 % bootstrap intervals of the mean.",
            tables=self.tables(),
            left_out=self.left_out,
            charts=self._charts(),
            cards=show_cards(
                self.widest_first[:_SHOWN_CASES],
                self._card,
                "Widest gaps first" if len(self.runs) > 1 else "Lowest scores first",
                f"{len(self.cases)} pictures",
            ),
        )

    def _charts(self) -> Iterator[Chart]:
        from minigpt4_runtime.report.chart import draw

        yield draw("Scores of all answers.", self._paint_scores)
        if self.comparisons:
            caption = (
                f"Each picture's score, less that of {self.runs[0]}. Lines: means; bands: 95 %."
            )
            yield draw(caption, self._paint_differences)

    def _paint_scores(self, axes: Axes) -> None:
        scores = numpy.array([case.scores for case in self.cases])
        bins = numpy.histogram_bin_edges(scores, bins=20).tolist()
        for run, column in zip(self.runs, scores.T, strict=True):
            axes.hist(column, bins=bins, histtype="step", linewidth=1.8, label=run)
        axes.set(xlabel="score", ylabel="answers")
        axes.legend()

    def _paint_differences(self, axes: Axes) -> None:
        columns = [self.differences(index) for index in range(1, len(self.runs))]
        bins = numpy.histogram_bin_edges(numpy.array(columns), bins=20).tolist()
        for index, (run, column) in enumerate(zip(self.runs[1:], columns, strict=True), start=1):
            compared, colour = self.comparisons[run], f"C{index}"
            axes.hist(column, bins=bins, histtype="step", linewidth=1.8, color=colour, label=run)
            axes.axvspan(compared.low, compared.high, color=colour, alpha=0.2, linewidth=0)
            axes.axvline(compared.mean_difference, color=colour)
        axes.axvline(0, color="#888888", linestyle=":")
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=f"score less that of {self.runs[0]}", ylabel="pictures")
        axes.legend()

    def _card(self, case: ScoredCase) -> Card:
        best = max(case.scores)
        has_winner = case.scores.count(best) == 1 < len(self.runs)
        entries = tuple(
            CardText(
                f"{run} · {answer.score:.4f}"
                + (f" · cut at {self.max_tokens} tokens" if answer.is_cut else ""),
                plain(answer.text),
                is_best=has_winner and answer.score == best,
            )
            for run, answer in zip(self.runs, case.answers, strict=True)
        )
        title = f"{case.name} · gap {case.gap:.4f}" if len(self.runs) > 1 else case.name
        return Card(title, entries, find_thumbnail(self.images_dir, case.name))
