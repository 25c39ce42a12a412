"""The layout that the judges' pages share.

Owns   the order of the parts of a page, and the cards for questions.
Takes  tables, charts and cards; gives HTML.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from minigpt4_runtime.report.page import Card, CardText, Chart, Gallery, Paragraph, plain, render
from minigpt4_runtime.report.table import Table

T = TypeVar("T")


def judged_page(
    title: str,
    explanation: str,
    *,
    tables: Iterable[Table],
    left_out: Iterable[str] = (),
    as_published: str = "",
    charts: Iterable[Chart],
    cards: Gallery | Paragraph,
) -> str:
    """A page: the explanation, the tables, what was left out, the charts and the cards.

    `as_published` names the published run that asked so, and what differs from it.
    """
    told = [Paragraph(explanation), *([Paragraph(as_published)] if as_published else [])]
    missing = (Paragraph(f"Left out: {sentence}") for sentence in left_out)
    return render(title, [*told, *tables, *missing, *charts, cards])


def show_cards(
    shown: Iterable[T],
    card: Callable[[T], Card],
    heading: str,
    whole: str,
    *,
    empty: str = "All answers are right.",
) -> Gallery | Paragraph:
    """Cards under a heading with their number, such as "Wrong answers (50 of 61)", or `empty`."""
    cards = tuple(map(card, shown))
    return Gallery(f"{heading} ({len(cards)} of {whole})", cards) if cards else Paragraph(empty)


def question_card(title: str, question: str, given: str, right: str, image: str | None) -> Card:
    """A card with a question, the answer and the right answer."""
    wrong_entry = CardText(question, plain(given))
    return Card(title, (wrong_entry, CardText("Right would be", plain(right), is_best=True)), image)
