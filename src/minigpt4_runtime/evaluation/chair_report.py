"""The results of CHAIR: how many captions and mentions are of objects that are not there.

Owns   the four numbers.
Takes  captions, the objects in their pictures and the words for them; gives a ChairReport.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import name_some
from minigpt4_runtime.evaluation.asking import share
from minigpt4_runtime.evaluation.chair import Caption, Mention, ObjectWords, split_words
from minigpt4_runtime.evaluation.images import find_thumbnail
from minigpt4_runtime.evaluation.pages import judged_page, question_card, show_cards
from minigpt4_runtime.report.page import Card
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_CASES = 50
_SHOWN_OBJECTS = 15


@dataclass(frozen=True)
class ChairVerdict:
    """A caption, what it names, and what is in its picture."""

    caption: Caption
    mentions: tuple[Mention, ...]
    objects: frozenset[str]

    @property
    def absent(self) -> tuple[Mention, ...]:
        """The mentions of objects that are not there."""
        return tuple(each for each in self.mentions if each.object not in self.objects)

    @property
    def num_found(self) -> int:
        """How many of the picture's objects are named."""
        return len(self.objects & {each.object for each in self.mentions})

    @property
    def num_words(self) -> int:
        """The caption's length."""
        return len(split_words(self.caption.text))


def judge(
    captions: Sequence[Caption],
    objects: Mapping[int, frozenset[str]],
    words: ObjectWords,
    *,
    images_dir: Path | None = None,
    faults: Sequence[str] = (),
) -> ChairReport:
    """Find what captions name.

    Raises:
        ConfigError: no caption is of a picture with annotations.
    """
    known = [each for each in captions if each.image_id in objects]
    strays = [each.image_id for each in captions if each.image_id not in objects]
    left_out = [*faults]
    if strays:
        left_out.append(f"COCO's annotations lack {name_some(strays)}.")
    if not known:
        raise ConfigError(" ".join(["No caption is of a picture with annotations.", *left_out]))
    verdicts = tuple(
        ChairVerdict(each, tuple(words.find(each.text)), objects[each.image_id]) for each in known
    )
    return ChairReport(verdicts, tuple(left_out), images_dir)


@dataclass(frozen=True)
class ChairReport:
    """Numbers over captions whose pictures have annotations."""

    verdicts: tuple[ChairVerdict, ...]
    left_out: tuple[str, ...]
    images_dir: Path | None
    as_published: str = ""

    @property
    def rates(self) -> dict[str, float | int | None]:
        """CHAIRs of captions, CHAIRi of mentions, the recall of objects, and the mean length."""
        count = len(self.verdicts)
        mentions = sum(len(each.mentions) for each in self.verdicts)
        return {
            "chair_s": share(sum(bool(each.absent) for each in self.verdicts), count),
            "chair_i": share(sum(len(each.absent) for each in self.verdicts), mentions),
            "recall": share(
                sum(each.num_found for each in self.verdicts),
                sum(len(each.objects) for each in self.verdicts),
            ),
            "words": share(sum(each.num_words for each in self.verdicts), count),
            "captions": count,
            "mentions": mentions,
        }

    def tables(self) -> list[Table]:
        """The numbers, and the objects that are most often seen and not there."""
        specs = {"chair_s": ".1%", "chair_i": ".1%", "recall": ".1%", "words": ".1f"}
        titles = {"chair_s": "CHAIRs", "chair_i": "CHAIRi"}
        columns = tuple(Column(titles.get(n, n), specs.get(n, "")) for n in self.rates)
        tables = [Table(columns, (tuple(self.rates.values()),))]
        if absent := self._absent().most_common(_SHOWN_OBJECTS):
            tables.append(Table((Column("not there"), Column("named")), tuple(absent)))
        return tables

    def _absent(self) -> Counter[str]:
        return Counter(mention.object for each in self.verdicts for mention in each.absent)

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **self.rates,
            "left_out": list(self.left_out),
            "as_published": self.as_published,
            "answers": [
                {
                    "image_id": each.caption.image_id,
                    "caption": each.caption.text,
                    "named": [list(mention) for mention in each.mentions],
                    "not_there": [list(mention) for mention in each.absent],
                    "objects": sorted(each.objects),
                }
                for each in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each caption."""
        names = ("image_id", "mentions", "not_there", "found", "objects", "words", "caption")
        rows = (
            (each.caption.image_id, len(each.mentions), len(each.absent), each.num_found,
             len(each.objects), each.num_words, each.caption.text)
            for each in self.verdicts
        )  # fmt: skip
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_page(self) -> str:
        """The numbers, what is most often invented, and the captions that invent most."""
        from minigpt4_runtime.report.chart import draw

        wrong = [each for each in self.verdicts if each.absent]
        wrong.sort(key=lambda each: -len(each.absent))
        return judged_page(
            "Does it describe things that are not there?",
            "CHAIRs is the share of captions that name an object which is not in the picture, "
            "CHAIRi the share of such mentions among all, and recall the share of the pictures' "
            "objects that are named. What is there is known from COCO's segments and captions.",
            tables=self.tables(),
            left_out=self.left_out,
            as_published=self.as_published,
            charts=[draw("What is most often named and not there.", self._paint_absent)],
            cards=show_cards(
                wrong[:_SHOWN_CASES], self._card, "Captions that name what is not there",
                f"{len(wrong)}", empty="No caption names an object that is not there.",
            ),
        )  # fmt: skip

    def _paint_absent(self, axes: Axes) -> None:
        most = self._absent().most_common(_SHOWN_OBJECTS)
        axes.barh([name for name, _ in most], [count for _, count in most])
        axes.invert_yaxis()
        axes.set(xlabel="mentions")

    def _card(self, verdict: ChairVerdict) -> Card:
        caption = verdict.caption
        shown = find_thumbnail(self.images_dir, caption.image) if caption.image else None
        named = ", ".join(dict.fromkeys(mention.word for mention in verdict.absent))
        there = ", ".join(sorted(verdict.objects)) or "none of COCO's objects"
        return question_card(
            f"{caption.image_id}", f"Not there: {named}", caption.text, there, shown
        )
