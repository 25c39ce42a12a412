"""`minigpt4 inspect`: the content of a model folder, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.options import flag

if TYPE_CHECKING:
    from minigpt4_runtime.checkpoint.report import FolderReport


def inspect(
    model_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model folder, or the name of a fetched model.")
    ],
    *,
    as_json: Annotated[bool, flag("Print JSON instead of tables.", "--json")] = False,
) -> None:
    """Show what a model folder holds, and where it came from.

    That is its variant, sizes, dtypes and template, and the published files it was made of.
    """
    from minigpt4_runtime.checkpoint.report import inspect_folder
    from minigpt4_runtime.checkpoint.shelf import find_model

    report = inspect_folder(find_model(model_dir))
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print_tables(report)


def _print_tables(report: FolderReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from minigpt4_runtime.checkpoint.weights import show_bytes

    facts = Table.grid(padding=(0, 2))
    for name, value in report.facts():
        facts.add_row(name, value)
    towers = Table("part", "sizes", "parameters", "size", "format", box=None, pad_edge=False)
    for column in (towers.columns[2], towers.columns[3]):
        column.justify = "right"
    for column in towers.columns[:4]:
        column.no_wrap = True
    for row in report.tower_rows():
        towers.add_row(*row)
    sources = Table("made from", "file", "size", "sha256", box=None, pad_edge=False)
    sources.columns[2].justify = "right"
    # The beginning of a digest is enough to compare by eye; --json has all of it.
    for each in report.sources:
        sources.add_row(each.role, each.name, show_bytes(each.size), each.sha256[:12])
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(report.path)
    for table in (facts, towers, *((sources,) if report.sources else ())):
        console.print()
        console.print(table)
