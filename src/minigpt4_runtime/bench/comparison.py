"""The change since an older report, compared with the noise of both runs.

Owns   which points of two reports belong together, and when a change is more than noise.
Takes  an older report and the points of a new run. Only times are compared: less is better.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minigpt4_runtime.bench.spread import Measured, noise
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.table import Column, Table

KEYS = {
    "bench vision": ("runtime", "start", "batch_size"),
    "bench language": ("batch_size", "input_length", "output_length"),
    "bench describe": ("num_images",),
}
Tries = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class OldReport:
    """An older report: the tries of each of its points, and the facts of its run."""

    path: Path
    kind: str
    tries: Mapping[tuple[str, ...], Tries]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One time of one point in both reports: medians of the tries, in the unit of its name."""

    about: tuple[str, ...]
    name: str
    old: float
    new: float
    old_noise: float | None
    new_noise: float | None

    @property
    def change(self) -> float:
        """The change as a share of the old time: -0.1 is a tenth less."""
        return self.new / self.old - 1

    @property
    def verdict(self) -> str:
        """Whether the change is more than the sum of both runs' noise."""
        if self.old_noise is None or self.new_noise is None:
            return "one try: noise unknown"
        if abs(self.change) <= self.old_noise + self.new_noise:
            return "within noise"
        return "faster" if self.change < 0 else "slower"


@dataclass(frozen=True)
class Comparison:
    """The times that are in both reports, and the facts that differ between the two runs."""

    old: OldReport
    changes: tuple[Change, ...]
    differences: tuple[str, ...]

    def as_table(self) -> Table:
        """The changes, one a row."""
        columns = (
            *(Column(key.replace("_", " ")) for key in KEYS[self.old.kind]),
            Column("time"), Column("old", ".2f"), Column("new", ".2f"), Column("change", "+.1%"),
            Column("old noise ±", ".1%"), Column("new noise ±", ".1%"), Column("verdict"),
        )  # fmt: skip
        rows = tuple(
            (*each.about, each.name, each.old, each.new, each.change, each.old_noise,
             each.new_noise, each.verdict)
            for each in self.changes
        )  # fmt: skip
        return Table(columns, rows, caption=f"Beside {self.old.path}")


def read_report(path: Path, kind: str) -> OldReport:
    """Read an older report of the same command.

    Raises:
        ConfigError: it cannot be read, or is not a report of this command.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--compare: {path} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ConfigError(f"--compare: {path} is not JSON. Name a report (.json).") from None
    found = report.get("report") if isinstance(report, dict) else None
    if found != kind:
        raise ConfigError(
            f"--compare: {path} is {f'a report of {found}' if found else 'no report'}; this is "
            f"{kind}. Name one of the same command."
        )
    try:
        tries = {_about(kind, point): _read_tries(point["tries"]) for point in report["points"]}
        return OldReport(path, kind, tries, dict(report["facts"]))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"--compare: {path} is damaged. Make it again.") from None


def compare(
    old: OldReport, measured: Sequence[Measured[Any]], facts: Mapping[str, str]
) -> Comparison:
    """Pair the times that are in both reports, and name every fact that differs."""
    changes = [
        Change(about, name, median(then), median(now), noise(then), noise(now))
        for each in measured
        if (about := _about(old.kind, each.as_mapping())) in old.tries
        for name, now in each.tries.items()
        if (then := old.tries[about].get(name))
    ]
    differences = [
        f"{name}: {old.facts.get(name, 'unknown')} then, {fact} now"
        for name, fact in facts.items()
        if old.facts.get(name) != fact
    ]
    return Comparison(old, tuple(changes), tuple(differences))


def _about(kind: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(point[key]) for key in KEYS[kind])


def _read_tries(tries: Mapping[str, Sequence[Any]]) -> Tries:
    """Check that each time has at least one value, and that all values are positive."""
    read = {name: [float(value) for value in values] for name, values in tries.items()}
    if not all(values and min(values) > 0 for values in read.values()):
        raise ValueError("a time must be above 0")
    return read
