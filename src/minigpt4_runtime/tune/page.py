"""The page of a training: its losses, its rate of learning, and what it says before and after.

Owns   tune.html, made of what is in the training's folder.
Takes  that folder, and facts in words; gives the page's path.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4_runtime.report.files import read_text, write_whole
from minigpt4_runtime.report.page import (
    Block,
    Card,
    CardText,
    Chart,
    Gallery,
    Paragraph,
    plain,
    render,
)
from minigpt4_runtime.report.table import Column, Table
from minigpt4_runtime.tune.samples import SAMPLES_NAME, Sample, read_samples
from minigpt4_runtime.tune.tune import LOSSES_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_NAME = "tune.html"
# The line of the training's loss is a mean over so large a part of all steps.
_PART = 25


@dataclass(frozen=True)
class _Point:
    step: int
    loss: float
    rate: float
    held_out: float | None


def write_page(out_dir: Path, facts: Mapping[str, object]) -> Path:
    """Write or replace the page of a training, whole or stopped.

    Raises:
        ConfigError: it cannot be written.
        BackendUnavailableError: a package for it is not installed.
    """
    points = _read_points(out_dir / LOSSES_NAME)
    samples = read_samples(out_dir / SAMPLES_NAME)
    rows = tuple((name, str(value)) for name, value in facts.items())
    blocks: list[Block] = [
        Paragraph(
            "The loss is the mean of -log p over the ids of the answers, before the step that "
            "learns from them. Held-out answers are not learned from."
        ),
        Table((Column("what"), Column("value")), rows),
    ]
    if points:
        blocks += [_losses(points), *_charts(points)]
    if samples:
        blocks.append(Gallery("Answers before and after", tuple(map(_card, samples))))
    write_whole(out_dir / PAGE_NAME, render("A training", blocks))
    return out_dir / PAGE_NAME


def _read_points(path: Path) -> list[_Point]:
    lines = read_text(path).splitlines() if path.is_file() else []
    return [
        _Point(int(row["step"]), float(row["loss"]), float(row["rate"]),
               float(row["held_out"]) if row["held_out"] else None)
        for row in csv.DictReader(lines)
    ]  # fmt: skip


def _losses(points: Sequence[_Point]) -> Table:
    """The first and the last part of all steps, and each measure of the held-out answers."""
    part = _part(points)
    rows: list[tuple[str, float, float | None]] = [
        (f"1 to {points[part - 1].step}", _mean(points[:part]), _last_held_out(points[:part])),
        (f"{points[-part].step} to {points[-1].step}", _mean(points[-part:]),
         _last_held_out(points[-part:])),
    ]  # fmt: skip
    columns = (Column("steps"), Column("mean loss", ".4f"), Column("held-out loss", ".4f"))
    return Table(columns, tuple(rows), "At the beginning and at the end")


def _charts(points: Sequence[_Point]) -> list[Chart]:
    from minigpt4_runtime.report.chart import draw

    steps = [point.step for point in points]
    part = _part(points)
    means = [_mean(points[max(0, end - part) : end]) for end in range(1, len(points) + 1)]
    measured = {each.step: each.held_out for each in points if each.held_out is not None}

    def paint_losses(axes: Axes) -> None:
        axes.plot(steps, [point.loss for point in points], alpha=0.3, linewidth=0.8)
        axes.plot(steps, means, color="C0", label="training")
        if measured:
            axes.plot(
                list(measured), list(measured.values()),
                "s--", markersize=4, color="C1", label="held out",
            )  # fmt: skip
        axes.set(xlabel="step", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.legend()

    def paint_rate(axes: Axes) -> None:
        axes.plot(steps, [point.rate for point in points])
        axes.set(xlabel="step", ylabel="rate of learning")
        axes.set_ylim(bottom=0)

    mean = f"the line is the mean of the last {part} steps" if part > 1 else "a step at a time"
    squares = " Squares: of answers that are not learned from." if measured else ""
    return [
        draw(f"The loss of each step; {mean}.{squares}", paint_losses),
        draw("The rate of learning.", paint_rate),
    ]


def _card(sample: Sample) -> Card:
    entries = [
        CardText(label, plain(said))
        for label, said in (("Before", sample.before), ("After", sample.after))
        if said is not None
    ]
    right = CardText("Right would be", plain(sample.right), is_best=True)
    return Card(f"{sample.place}: {sample.asked}", (*entries, right), sample.picture)


def _part(points: Sequence[_Point]) -> int:
    return max(1, len(points) // _PART)


def _mean(points: Sequence[_Point]) -> float:
    return sum(point.loss for point in points) / len(points)


def _last_held_out(points: Sequence[_Point]) -> float | None:
    measured = [point.held_out for point in points if point.held_out is not None]
    return measured[-1] if measured else None
