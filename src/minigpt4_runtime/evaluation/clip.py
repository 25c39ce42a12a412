"""How well answers fit their pictures, by a CLIP model: higher is better.

Owns   the score of an answer (the cosine between its embedding and its picture's), the comparison
       of runs, and their report.
Takes  a LineUp, a Judge and a Ledger of scores; gives a ClipReport.
Never  knows where answers come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.evaluation.statistics import PairedComparison
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import image
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from minigpt4_runtime.evaluation.answers import Case, LineUp
    from minigpt4_runtime.evaluation.judge import Judge
    from minigpt4_runtime.report.ledger import Ledger
    from minigpt4_runtime.report.page import Card, Chart

LEDGER_KEYS = ("judge", "picture", "answer")
_AT_ONCE = 8
_DECIMALS = 6  # Beyond them scores depend on what else was in the batch; equal ones are ties.
_SHOWN_CASES = 100


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, its score, and whether it was longer than the judge reads."""

    text: str
    score: float
    is_cut: bool


@dataclass(frozen=True)
class ScoredCase:
    """A picture and its scored answers, one for each run."""

    name: str
    answers: tuple[ScoredAnswer, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """One for each run."""
        return tuple(answer.score for answer in self.answers)

    @property
    def gap(self) -> float:
        """Between the best and the worst answer."""
        return max(self.scores) - min(self.scores)


def score(
    those: LineUp,
    judge: Judge,
    ledger: Ledger,
    *,
    images_dir: Path,
    on_picture: Callable[[], None] = lambda: None,
) -> ClipReport:
    """Score every answer that the ledger does not have; `on_picture` hears of each that is done.

    Raises:
        ConfigError: not one of the pictures can be read.
    """
    scorer = _Scorer(judge, ledger, images_dir)
    scored: list[ScoredCase] = []
    for first in range(0, len(those.cases), _AT_ONCE):
        some = those.cases[first : first + _AT_ONCE]
        scored += scorer.of(some)
        for _ in some:
            on_picture()
    left_out = (*those.left_out, *scorer.bad)
    if not scored:
        raise ConfigError(" ".join(["No picture could be judged.", *left_out]))
    return ClipReport(those.runs, tuple(scored), left_out, images_dir, judge.max_tokens)


class _Scorer:
    """Opens pictures and asks the judge, some cases at a time. `bad` are those it could not."""

    def __init__(self, judge: Judge, ledger: Ledger, images_dir: Path) -> None:
        self._judge = judge
        self._ledger = ledger
        self._images_dir = images_dir
        self.bad: list[str] = []

    def of(self, cases: Sequence[Case]) -> list[ScoredCase]:
        pictures = {case: picture for case in cases if (picture := self._open(case))}
        digests = {case: _digest(picture) for case, picture in pictures.items()}
        todo = [
            case for case, digest in digests.items()
            if any(self._find(digest, answer.text) is None for answer in case.answers)
        ]  # fmt: skip
        if todo:
            rows = self._judge.embed_pictures([pictures[case] for case in todo])
            for case, row in zip(todo, rows, strict=True):
                self._judge_one(case, digests[case], row.numpy())
        return [self._collect(case, digest) for case, digest in digests.items()]

    def _open(self, case: Case) -> Image | None:
        try:
            return open_rgb(image(self._images_dir / case.name))
        except ImageError as error:
            self.bad.append(str(error))
            return None

    def _judge_one(self, case: Case, digest: str, picture_row: numpy.ndarray[Any, Any]) -> None:
        texts = [answer.text for answer in case.answers]
        text_rows = self._judge.embed_texts(texts).numpy()
        lengths = self._judge.count_tokens(texts)
        for text, text_row, length in zip(texts, text_rows, lengths, strict=True):
            if self._find(digest, text) is None:
                self._ledger.add({
                    "image": case.name, "judge": self._judge.digest, "picture": digest,
                    "answer": text, "score": round(float(picture_row @ text_row), _DECIMALS),
                    "is_cut": length > self._judge.max_tokens,
                })  # fmt: skip

    def _find(self, digest: str, text: str) -> dict[str, Any] | None:
        return self._ledger.find(judge=self._judge.digest, picture=digest, answer=text)

    def _collect(self, case: Case, digest: str) -> ScoredCase:
        answers = []
        for answer in case.answers:
            record = self._find(digest, answer.text)
            assert record is not None, "scored just before"
            answers.append(ScoredAnswer(answer.text, record["score"], record["is_cut"]))
        return ScoredCase(case.name, tuple(answers))


def _digest(picture: Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


@dataclass(frozen=True)
class ClipReport:
    """What the judge came to. Every run after the first is compared with the first."""

    runs: tuple[str, ...]
    cases: tuple[ScoredCase, ...]
    left_out: tuple[str, ...]
    images_dir: Path
    max_tokens: int

    @property
    def means(self) -> tuple[float, ...]:
        """Each run's mean score."""
        scores = numpy.array([case.scores for case in self.cases])
        return tuple(float(mean) for mean in scores.mean(axis=0))

    @property
    def num_cut(self) -> tuple[int, ...]:
        """How many of each run's answers were longer than the judge reads."""
        return tuple(
            sum(case.answers[index].is_cut for case in self.cases)
            for index in range(len(self.runs))
        )

    @cached_property
    def comparisons(self) -> dict[str, PairedComparison]:
        """How much higher each run scores than the first."""
        return {
            run: PairedComparison.of(self.differences(index))
            for index, run in enumerate(self.runs)
            if index
        }

    def differences(self, index: int) -> list[float]:
        """For each picture, how much higher that run scores than the first."""
        return [round(case.scores[index] - case.scores[0], _DECIMALS) for case in self.cases]

    @property
    def widest_first(self) -> list[ScoredCase]:
        """The pictures on which runs differ most; of a single run, the worst answers."""
        if len(self.runs) == 1:
            return sorted(self.cases, key=lambda case: case.scores[0])
        return sorted(self.cases, key=lambda case: -case.gap)

    def tables(self) -> list[Table]:
        """Means, then comparisons."""
        return [self._means_table(), *([self._comparison_table()] if self.comparisons else [])]

    def _means_table(self) -> Table:
        cut = f"over {self.max_tokens} tokens"
        return Table(
            (Column("run"), Column("mean", ".4f"), Column("pictures"), Column(cut)),
            tuple(
                (run, mean, len(self.cases), num_cut)
                for run, mean, num_cut in zip(self.runs, self.means, self.num_cut, strict=True)
            ),
        )

    def _comparison_table(self) -> Table:
        return Table(
            (
                Column(f"against {self.runs[0]}"),
                *(Column(name) for name in ("wins", "ties", "losses")),
                *(Column(name, "+.4f") for name in ("mean difference", "95 % from", "to")),
            ),
            tuple(
                (run, each.wins, each.ties, each.losses, each.mean_difference, each.low, each.high)
                for run, each in self.comparisons.items()
            ),
        )

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            "runs": {
                run: {"mean": mean, "pictures": len(self.cases), "cut": cut}
                for run, mean, cut in zip(self.runs, self.means, self.num_cut, strict=True)
            },
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
        return Table(
            tuple(Column(name) for name in names),
            tuple(
                (case.name, run, answer.score, int(answer.is_cut), answer.text)
                for case in self.cases
                for run, answer in zip(self.runs, case.answers, strict=True)
            ),
        )

    def as_page(self) -> str:
        """Means, plots, and the pictures on which runs differ most."""
        from minigpt4_runtime.report.page import Gallery, Paragraph, render

        shown = self.widest_first[:_SHOWN_CASES]
        what = "Widest gaps first" if len(self.runs) > 1 else "Lowest scores first"
        return render(
            "How well the answers fit their pictures",
            [
                Paragraph(
                    "A CLIP model scored each answer against its picture: the cosine between the "
                    f"two, higher is better. It reads {self.max_tokens} tokens of an answer, "
                    "and longer ones are cut. Intervals are 95 % bootstrap intervals of the mean."
                ),
                *self.tables(),
                *(Paragraph(f"Left out: {sentence}") for sentence in self.left_out),
                *self._charts(),
                Gallery(
                    f"{what} ({len(shown)} of {len(self.cases)} pictures)",
                    tuple(self._card(case) for case in shown),
                ),
            ],
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
            compared = self.comparisons[run]
            axes.hist(
                column, bins=bins, histtype="step", linewidth=1.8, color=f"C{index}", label=run
            )
            axes.axvspan(compared.low, compared.high, color=f"C{index}", alpha=0.2, linewidth=0)
            axes.axvline(compared.mean_difference, color=f"C{index}")
        axes.axvline(0, color="#888888", linestyle=":")
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=f"score less that of {self.runs[0]}", ylabel="pictures")
        axes.legend()

    def _card(self, case: ScoredCase) -> Card:
        from minigpt4_runtime.report.page import Card, Entry, plain, thumbnail

        best = max(case.scores)
        has_winner = case.scores.count(best) == 1 < len(self.runs)
        entries = tuple(
            Entry(
                f"{run} · {answer.score:.4f}"
                + (f" · cut at {self.max_tokens} tokens" if answer.is_cut else ""),
                plain(answer.text),
                is_best=has_winner and answer.score == best,
            )
            for run, answer in zip(self.runs, case.answers, strict=True)
        )
        picture = thumbnail(open_rgb(image(self.images_dir / case.name)))
        return Card(f"{case.name} · gap {case.gap:.4f}" if len(self.runs) > 1 else case.name,
                    entries, picture)  # fmt: skip
