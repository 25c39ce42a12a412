"""A table says the same on a terminal, in a spreadsheet and on a page."""

import csv
import io

import pytest

from minigpt4_runtime.report.table import Column, Table

TABLE = Table(
    (Column("run"), Column("mean", ".2f"), Column("wins")),
    (("GPU", 0.31415, 12), ('a, "b"\nc', None, 3), ("昇腾", 2.0, 100)),
)


def test_columns_stand_below_each_other():
    table = Table(TABLE.columns, (TABLE.rows[0], TABLE.rows[2]), "Means")
    assert table.as_text().splitlines() == [
        "Means",
        "run   mean  wins",
        "GPU   0.31    12",
        # A Chinese character takes two cells.
        "昇腾  2.00   100",
    ]


def test_csv_keeps_every_digit_and_every_character():
    rows = list(csv.reader(io.StringIO(TABLE.as_csv(), newline="")))
    assert rows == [
        ["run", "mean", "wins"], ["GPU", "0.31415", "12"], ["a, \"b\"\nc", "", "3"],
        ["昇腾", "2.0", "100"],
    ]  # fmt: skip


def test_what_is_not_known_is_a_dash():
    assert TABLE.shown_rows[1] == ('a, "b"\nc', "–", "3")
    assert TABLE.are_numbers == (False, True, True)


def test_a_column_of_numbers_none_of_which_is_known_stands_on_the_right():
    table = Table((Column("x"), Column("share", ".1%")), (("a", None),))
    assert table.as_text() == "x  share\na      –"


def test_a_row_of_another_length_is_our_mistake():
    with pytest.raises(AssertionError):
        Table((Column("one"),), ((1, 2),))


def test_a_table_without_rows_is_its_heading():
    assert Table(TABLE.columns, ()).as_text() == "run  mean  wins"
