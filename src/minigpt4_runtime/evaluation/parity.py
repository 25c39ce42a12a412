"""Whether another way to run a model changes its answers.

Owns   the comparison of two answers (equal or not, where they part, how similar they are), and its
       report.
Takes  a LineUp of two runs; a Judge to compare embeddings too; a Divergence to compare what their
       models expect.
Never  says which of two answers is better.
"""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.evaluation.answers import Case, LineUp, name_some
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, show_cards
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.ledger import Ledger
from minigpt4_runtime.report.page import Card, CardText, Chart, Span
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minigpt4_runtime.evaluation.divergence import Divergence
    from minigpt4_runtime.evaluation.judge import Judge

distance = require("rapidfuzz.distance", extra="eval")

LEDGER_KEYS = ("judge", "reference", "candidate")
_SHOWN_CASES = 50
_SHOWN_IN_TEXT, _SHOWN_CHARACTERS = 3, 76
_KL = (
    "KL: the divergence of what the candidate's model expects at each token of the reference's "
    "answer from what the reference's model expects there."
)
_NO_KL = (
    "KL is not known: it takes both models and the pictures (--reference-model, --candidate-model, "
    "--images), and a reference with token_ids."
)
_WORD = re.compile(r"\w+|[^\w\s]")
_WORD_OR_SPACE = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Pair:
    """Two answers about one image.

    They part after `num_equal` tokens or words; None if the texts are equal. `agreement` is the
    share of places, of those of the longer answer, with the same token or word. `edit_ratio` is 1
    less the share of characters to edit, `cosine` the similarity of the texts' embeddings. `kl` is
    the KL divergence of next-token distributions, reference to candidate, in nats: the mean over
    the tokens of the reference's answer.
    """

    name: str
    reference: str
    candidate: str
    num_equal: int | None
    agreement: float
    edit_ratio: float
    cosine: float | None = None
    kl: float | None = None


def compare(
    those: LineUp,
    *,
    judge: Judge | None,
    ledger: Ledger,
    divergence: Divergence | None = None,
    images_dir: Path | None = None,
    on_pair: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Compare a reference and a candidate, image by image."""
    has_ids = all(answer.token_ids for case in those.cases for answer in case.answers)
    pairs = []
    unknown: dict[str, list[str]] = {}  # Images without a KL, by the reason.
    for case in those.cases:
        reference, candidate = (answer.text for answer in case.answers)
        cosine = _cosine(reference, candidate, judge, ledger) if judge else None
        try:
            kl = _kl(case, divergence, ledger) if divergence else None
        except RequestError as error:
            kl = None
            unknown.setdefault(str(error), []).append(case.name)
        pairs.append(Pair(
            case.name, reference, candidate, _count_equal(case, has_ids=has_ids),
            _agreement(case, has_ids=has_ids),
            distance.Levenshtein.normalized_similarity(reference, candidate), cosine, kl,
        ))  # fmt: skip
        on_pair()
    unit = "tokens" if has_ids else "words"
    faults = (f"No KL for {name_some(names)}. {why}" for why, names in unknown.items())
    left_out = (*those.left_out, *faults)
    return ParityReport(those.runs, tuple(pairs), left_out, unit, images_dir)


def _count_equal(case: Case, *, has_ids: bool) -> int | None:
    """How many tokens or words both answers begin with; None if the texts are equal."""
    if case.answers[0].text == case.answers[1].text:
        return None
    return int(distance.Prefix.similarity(*_units(case, has_ids=has_ids)))


def _agreement(case: Case, *, has_ids: bool) -> float:
    """At how many places both answers have the same token or word, from 0 to 1."""
    reference, candidate = _units(case, has_ids=has_ids)
    longest = max(len(reference), len(candidate))
    same = sum(one == other for one, other in zip(reference, candidate, strict=False))
    return same / longest if longest else 1.0


def _units(case: Case, *, has_ids: bool) -> list[Sequence[object]]:
    """The tokens of both answers, or their words where a run has no tokens."""
    return [
        (answer.token_ids or ()) if has_ids else _WORD.findall(answer.text)
        for answer in case.answers
    ]


def _cosine(reference: str, candidate: str, judge: Judge, ledger: Ledger) -> float:
    if reference == candidate:
        return 1.0
    record = ledger.find(judge=judge.digest, reference=reference, candidate=candidate)
    if record is None:
        one, other = judge.embed_texts([reference, candidate])
        record = {
            "judge": judge.digest, "reference": reference, "candidate": candidate,
            "cosine": round(float(one @ other), 6),
        }  # fmt: skip
        ledger.add(record)
    return float(record["cosine"])


def _kl(case: Case, divergence: Divergence, ledger: Ledger) -> float:
    about = {
        "judge": f"{divergence.name}, {case.name}",
        "reference": case.answers[0].text, "candidate": case.answers[1].text,
    }  # fmt: skip
    record = ledger.find(**about)
    if record is None:
        record = {**about, "kl": divergence.of(case)}
        ledger.add(record)
    return float(record["kl"])


@dataclass(frozen=True)
class ParityReport:
    """The comparison. `unit` is the unit of `num_equal`: tokens or words."""

    runs: tuple[str, ...]
    pairs: tuple[Pair, ...]
    left_out: tuple[str, ...]
    unit: str
    images_dir: Path | None

    @property
    def worst_first(self) -> list[Pair]:
        """The pairs that differ, the least similar first."""
        changed = [pair for pair in self.pairs if pair.num_equal is not None]
        return sorted(changed, key=lambda pair: pair.edit_ratio)

    @property
    def exact_rate(self) -> float:
        """The share of images with the same answer, from 0 to 1."""
        return 1 - len(self.worst_first) / len(self.pairs)

    @property
    def first_parting(self) -> list[int]:
        """For each pair that differs, after how many tokens or words."""
        return [pair.num_equal for pair in self.pairs if pair.num_equal is not None]

    @property
    def mean_agreement(self) -> float:
        """Over all images, from 0 to 1."""
        return statistics.fmean(pair.agreement for pair in self.pairs)

    @property
    def mean_edit_ratio(self) -> float:
        """Over all images, from 0 to 1."""
        return statistics.fmean(pair.edit_ratio for pair in self.pairs)

    @property
    def mean_cosine(self) -> float | None:
        """Over all images; None without a judge."""
        cosines = [pair.cosine for pair in self.pairs if pair.cosine is not None]
        return statistics.fmean(cosines) if cosines else None

    @property
    def mean_kl(self) -> float | None:
        """Over all images that have it; None if none has."""
        divergences = [pair.kl for pair in self.pairs if pair.kl is not None]
        return statistics.fmean(divergences) if divergences else None

    def table(self) -> Table:
        """One row with all totals."""
        parting = self.first_parting
        return Table(
            (
                Column("pictures"), Column("same answer"), Column("rate", ".1%"),
                Column(f"{self.unit} that agree", ".1%"), Column("edit ratio", ".4f"),
                Column("cosine", ".4f"), Column("KL, nats", ".3g"),
                Column(f"{self.unit} until they part: median", "g"), Column("fewest"),
            ),
            ((
                len(self.pairs), len(self.pairs) - len(parting), self.exact_rate,
                self.mean_agreement, self.mean_edit_ratio, self.mean_cosine,
                self.mean_kl, statistics.median(parting) if parting else None,
                min(parting, default=None),
            ),),
        )  # fmt: skip

    def as_text(self) -> str:
        """The table, and the ends of the least similar answers from where they part."""
        lines = [f"{self.runs[1]} against {self.runs[0]}", self.table().as_text()]
        lines += [_NO_KL] if self.mean_kl is None else []
        for pair in self.worst_first[:_SHOWN_IN_TEXT]:
            one, other = (
                shorten(text, _SHOWN_CHARACTERS, placeholder=" …") for text in _endings(pair)
            )
            lines += [
                "",
                f"{pair.name}, after {pair.num_equal} {self.unit}",
                f"- {one}",
                f"+ {other}",
            ]
        return "\n".join(lines)

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            "reference": self.runs[0],
            "candidate": self.runs[1],
            "pictures": len(self.pairs),
            "exact_rate": self.exact_rate,
            "mean_agreement": self.mean_agreement,
            "mean_edit_ratio": self.mean_edit_ratio,
            "mean_cosine": self.mean_cosine,
            "mean_kl": self.mean_kl,
            "num_equal_unit": self.unit,
            "left_out": list(self.left_out),
            "pairs": [vars(pair) for pair in self.pairs],
        }

    def as_rows(self) -> Table:
        """One row for each image."""
        names = (
            "num_equal", "agreement", "edit_ratio", "cosine", "kl", "reference", "candidate",
        )  # fmt: skip
        rows = ((each.name, *(vars(each)[name] for name in names)) for each in self.pairs)
        return Table(tuple(map(Column, ("image", *names))), tuple(rows))

    def as_page(self) -> str:
        """The table, where answers part, and the answers that changed most."""
        worst = self.worst_first
        return judged_page(
            f"Does {self.runs[1]} say what {self.runs[0]} says?",
            "Same answer: equal in every character. Edit ratio: 1 less the number of characters "
            f"to put in, take out or replace, as a share of the longer answer. {self._about_kl}",
            tables=[self.table()],
            left_out=self.left_out,
            charts=self._charts(),
            cards=show_cards(
                worst[:_SHOWN_CASES],
                self._card,
                "The least alike first",
                f"{len(worst)} that differ",
                empty="All answers are the same.",
            ),
        )

    @property
    def _about_kl(self) -> str:
        return _NO_KL if self.mean_kl is None else _KL

    def _charts(self) -> Iterator[Chart]:
        if self.first_parting:
            from minigpt4_runtime.report.chart import draw

            caption = f"Share of answers that are still the same after so many {self.unit}."
            yield draw(caption, self._paint_parting)

    def _paint_parting(self, axes: Axes) -> None:
        parting = sorted(self.first_parting)
        shares = [1 - number / len(self.pairs) for number in range(len(parting) + 1)]
        end = parting[-1] * 1.1 + 1
        axes.step([0, *parting, end], [*shares, shares[-1]], where="post", linewidth=1.8)
        axes.set(xlabel=self.unit, ylabel="still the same", ylim=(0, 1.03), xlim=(0, end))

    def _card(self, pair: Pair) -> Card:
        removed, added = mark_changes(pair.reference, pair.candidate)
        title = f"{pair.name} · edit ratio {pair.edit_ratio:.4f}"
        title += f" · cosine {pair.cosine:.4f}" if pair.cosine is not None else ""
        title += f" · KL {pair.kl:.3g}" if pair.kl is not None else ""
        title += f" · they part after {pair.num_equal} {self.unit}"
        entries = CardText(self.runs[0], removed), CardText(self.runs[1], added)
        return Card(title, entries, find_thumbnail(self.images_dir, pair.name))


def _endings(pair: Pair) -> tuple[str, str]:
    """Both texts, from the first word that differs."""
    start = distance.Prefix.similarity(pair.reference, pair.candidate)
    start -= len(re.split(r"\s", pair.reference[:start])[-1])
    return pair.reference[start:], pair.candidate[start:]


def mark_changes(reference: str, candidate: str) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Both texts, divided into spans that are in both or in one only."""
    old, new = _WORD_OR_SPACE.findall(reference), _WORD_OR_SPACE.findall(candidate)
    removed, added = [], []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for what, first, last, new_first, new_last in matcher.get_opcodes():
        gone, come = "".join(old[first:last]), "".join(new[new_first:new_last])
        removed.append(Span(gone, "same" if what == "equal" else "removed"))
        added.append(Span(come, "same" if what == "equal" else "added"))
    old_spans, new_spans = (tuple(s for s in spans if s.text) for spans in (removed, added))
    return old_spans, new_spans
