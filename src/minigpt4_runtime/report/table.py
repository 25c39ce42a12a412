"""Rows of names and numbers → aligned text, CSV, and cells for a page.

Owns   how a value is shown, and on which side of its column.
Takes  columns and rows; a number stays a number until it is shown, so that CSV has all its digits.
Never  computes what stands in a cell.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from rich.cells import cell_len

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A heading, and how its cells are written: `spec` as in f"{cell:spec}"."""

    name: str
    spec: str = ""

    def shown(self, cell: Cell) -> str:
        """A cell as people read it; what is not known is a dash."""
        if cell is None:
            return "–"
        return cell if isinstance(cell, str) else format(cell, self.spec)


@dataclass(frozen=True)
class Table:
    """Each row has a cell for each column. Example: a run's name, its mean, its pictures."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        """A row of another length is a mistake of ours."""
        assert all(len(row) == len(self.columns) for row in self.rows), "a cell for each column"

    @property
    def shown_rows(self) -> tuple[tuple[str, ...], ...]:
        """All cells as people read them."""
        return tuple(
            tuple(column.shown(cell) for column, cell in zip(self.columns, row, strict=True))
            for row in self.rows
        )

    @property
    def are_numbers(self) -> tuple[bool, ...]:
        """For each column, whether it holds numbers: they stand on the right."""
        return tuple(
            bool(column.spec) or any(isinstance(row[index], (int, float)) for row in self.rows)
            for index, column in enumerate(self.columns)
        )

    def as_text(self) -> str:
        """For a terminal: columns two spaces apart."""
        lines = [tuple(column.name for column in self.columns), *self.shown_rows]
        widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(map(_pad, line, widths, self.are_numbers)).rstrip() for line in lines
        )
        return f"{self.caption}\n{text}" if self.caption else text

    def as_csv(self) -> str:
        """For spreadsheets and scripts: a line of headings, then every row with all its digits."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.name for column in self.columns)
        writer.writerows(self.rows)
        return file.getvalue()


def _pad(text: str, width: int, is_number: bool) -> str:
    # A Chinese character takes two cells of a terminal.
    space = " " * (width - cell_len(text))
    return space + text if is_number else text + space
