"""Tables as aligned text, CSV, and cells for a page.

Owns   the formatting and alignment of values.
Takes  columns and rows. Numbers are formatted only for display, so that CSV has all digits.
"""

import csv
import io
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A heading and the format of its cells: `spec` as in f"{cell:spec}"."""

    name: str
    spec: str = ""

    def shown(self, cell: Cell) -> str:
        """A formatted cell; None is a dash."""
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
        """Check the length of the rows."""
        assert all(len(row) == len(self.columns) for row in self.rows), "a cell for each column"

    @property
    def shown_rows(self) -> tuple[tuple[str, ...], ...]:
        """All cells, formatted."""
        return tuple(
            tuple(column.shown(cell) for column, cell in zip(self.columns, row, strict=True))
            for row in self.rows
        )

    @property
    def are_numbers(self) -> tuple[bool, ...]:
        """For each column, whether it holds numbers, which are aligned to the right."""
        return tuple(
            bool(column.spec) or any(isinstance(row[index], (int, float)) for row in self.rows)
            for index, column in enumerate(self.columns)
        )

    def as_text(self) -> str:
        """Aligned columns for a terminal, two spaces apart."""
        from rich.cells import cell_len  # Loaded late: `--help` must be quick.

        def pad(text: str, width: int, is_number: bool) -> str:
            # A Chinese character takes two cells of a terminal.
            space = " " * (width - cell_len(text))
            return space + text if is_number else text + space

        lines = [tuple(column.name for column in self.columns), *self.shown_rows]
        widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(map(pad, line, widths, self.are_numbers)).rstrip() for line in lines
        )
        return f"{self.caption}\n{text}" if self.caption else text

    def as_csv(self) -> str:
        """A line of headings, then every row with all digits."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.name for column in self.columns)
        writer.writerows(self.rows)
        return file.getvalue()
