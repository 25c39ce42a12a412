"""How an answer came about: where each word looked, what else was likely, since which layer.

Owns   the numbers of an `Explanation`, and their forms as text, table, JSON and page.
Takes  arrays on the CPU, which `explaining.py` computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.report.table import Column, Table

Floats = NDArray[numpy.float32]

END = "(end)"


@dataclass(frozen=True)
class Guess:
    """An id as it reads, with · for a space before it, and how likely it was."""

    text: str
    log_probability: float


@dataclass(frozen=True)
class Piece:
    """An id of the answer. `others` are the likeliest ids in its place, itself perhaps among them.

    `text` is what the id adds to the answer. `since` is the number of layers behind which the lens
    always has this id as the likeliest, None where it is not even in the end.
    """

    token_id: int
    text: str
    said: Guess
    others: tuple[Guess, ...]
    since: int | None


@dataclass(frozen=True)
class Word:
    """A word of the answer: the pieces `first` to `stop` - 1. What ended the answer is `END`."""

    text: str
    first: int
    stop: int


@dataclass(frozen=True)
class Band:
    """Layers that are looked at together: `first` to `stop` - 1."""

    name: str
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class Look:
    """Where the word `answer[start:stop]` looked: (N, P, P) shares as in `Explanation.heat`.

    They are the mean over all layers. `on_pictures` is the share on all rows of pictures.
    """

    word: str
    start: int
    stop: int
    heat: Floats
    on_pictures: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a pass over A ids of an answer about N pictures shows, in G bands of L layers.

    All shares are of the row that chose an id: the one before it. `heat` (G, A, N, P, P) are shares
    of attention, mean over heads and a band's layers, on each of P × P patches. `looks` (A, L) are
    shares on all rows of pictures, mean over heads, and `heads` (L, H) the same, mean over the
    answer's ids but not those of its end. `map` (A, M) are shares on what `columns` names: the ids
    of the prompt and of the answer before, and each picture as a whole. `lens` are the likeliest
    ids behind each of L + 1 numbers of layers.
    """

    prompt: str
    answer: str
    pieces: tuple[Piece, ...]
    words: tuple[Word, ...]
    bands: tuple[Band, ...]
    heat: Floats
    looks: Floats
    heads: Floats
    columns: tuple[str, ...]
    map: Floats
    lens: tuple[tuple[Guess, ...], ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)

    def heat_of(self, word: Word) -> Floats:
        """(G, N, P, P): the mean of its pieces."""
        heat: Floats = self.heat[:, word.first : word.stop].mean(1)
        return heat

    def showing(self, pictures: Sequence[Image.Image]) -> Explanation:
        """The same with these pictures to be shown in the place of those that the model saw.

        Raises:
            RequestError: they are not as many.
        """
        if len(pictures) != len(self.pictures):
            raise RequestError(
                f"{len(pictures)} pictures to show; the prompt has {len(self.pictures)}."
            )
        return replace(self, pictures=tuple(pictures))

    def as_text(self) -> str:
        """A row for each word."""
        return self._table(self._word_rows()).as_text()

    def as_rows(self) -> Table:
        """A row for each id of the answer."""
        rows = (
            (index, piece.text, piece.said.log_probability, self._on_pictures(index, index + 1),
             piece.since, " ".join(guess.text for guess in piece.others))
            for index, piece in enumerate(self.pieces)
        )  # fmt: skip
        names = ("number", "text", "log_probability", "on_picture", "since_layer", "likeliest")
        return Table(tuple(map(Column, names)), tuple(rows))

    def as_mapping(self) -> dict[str, Any]:
        """All numbers, rounded."""
        return {
            "prompt": self.prompt, "answer": self.answer,
            "pieces": [
                {"token_id": piece.token_id, "text": piece.text, "since_layer": piece.since,
                 **_guess(piece.said), "likeliest": [_guess(each) for each in piece.others]}
                for piece in self.pieces
            ],
            "words": [vars(word) for word in self.words],
            "bands": [vars(band) for band in self.bands],
            "heat": _rounded(self.heat), "looks": _rounded(self.looks),
            "heads": _rounded(self.heads), "columns": list(self.columns),
            "map": _rounded(self.map),
            "lens": [[_guess(guess) for guess in row] for row in self.lens],
        }  # fmt: skip

    def as_page(self) -> str:
        """A page of its own, with pictures.

        Raises:
            BackendUnavailableError: jinja2 is not installed.
        """
        from minigpt4_runtime.lab.explanation_page import render

        return render(self)

    def probability(self, word: Word) -> float:
        """That of all its pieces, each behind those before it."""
        said = (piece.said.log_probability for piece in self.pieces[word.first : word.stop])
        return float(numpy.exp(sum(said)))

    def on_pictures(self, word: Word) -> float:
        """The share of attention on all pictures, mean over layers and heads."""
        return self._on_pictures(word.first, word.stop)

    def since(self, word: Word) -> int | None:
        """Behind so many layers the lens has all its pieces for good; None if not even at last."""
        layers = [piece.since for piece in self.pieces[word.first : word.stop]]
        known = [layer for layer in layers if layer is not None]
        return max(known) if len(known) == len(layers) else None

    def _on_pictures(self, first: int, stop: int) -> float:
        return float(self.looks[first:stop].mean())

    def _word_rows(self) -> Iterator[tuple[str, float, float, int | None]]:
        for word in self.words:
            yield word.text, self.probability(word), self.on_pictures(word), self.since(word)

    def _table(self, rows: Iterator[tuple[str, float, float, int | None]]) -> Table:
        columns = (
            ("word", ""),
            ("probability", ".1%"),
            ("on the picture", ".1%"),
            ("since layer", ""),
        )
        return Table(tuple(Column(*each) for each in columns), tuple(rows))


def _rounded(values: Floats) -> list[Any]:
    rounded: list[Any] = values.astype(float).round(6).tolist()
    return rounded


def _guess(guess: Guess) -> dict[str, Any]:
    return {"label": guess.text, "log_probability": round(guess.log_probability, 6)}
