"""One run of a bench as it grows, and the report of it at any moment.

Owns   the facts and notes that stand around the points.
Takes  points, searches and notes as they come, and tells each in a line. Gives a BenchReport.
Never  writes a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.comparison import OldReport, compare
from minigpt4_runtime.bench.machine import machine_facts
from minigpt4_runtime.bench.report import BenchReport

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.bench.language import BatchSearch
    from minigpt4_runtime.bench.spread import Measured


@dataclass
class Run:
    """What has been measured so far. `command` is what was typed; `tell` shows a line."""

    kind: str
    command: str
    tell: Callable[[str], object]
    measured: list[Measured[Any]] = field(default_factory=list)
    searches: list[BatchSearch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Mapping[str, str] = field(default_factory=dict)
    _place: tuple[str, str] = field(default=("cpu", "float32"), init=False)

    def load(self, load: Callable[[], MiniGPT4], *, name: str) -> MiniGPT4:
        """Load what is measured, and note what it is and on what it runs."""
        model = load()
        vision, language = model.config.vision, model.config.language
        ranks = f", {model.tensor_parallel} ranks" if model.tensor_parallel > 1 else ""
        self._place = model.device, model.dtype
        self.facts = {
            "model": f"{name}: image tower {vision.num_hidden_layers} × {vision.hidden_size}, "
            f"language model {language.num_hidden_layers} × {language.hidden_size}",
            "runs on": f"{model.device} in {model.dtype}{ranks}",
            **machine_facts(model.device),
        }
        return model

    def add(self, measured: Measured[Any]) -> None:
        """Keep and tell one more point."""
        self.measured.append(measured)
        self.tell(measured.as_text())

    def report(self, old: OldReport | None = None) -> BenchReport:
        """The report of what is there, beside an older one. There is at least one point."""
        failures = (getattr(each.point, "failure", None) for each in self.measured)
        comparison = compare(old, self.measured, self.facts) if old is not None else None
        return BenchReport(
            self.kind,
            self.command,
            self.facts,
            # The whole job is bound by neither.
            None if self.kind == "bench describe" else measure_ceilings(*self._place),
            tuple(self.measured),
            searches=tuple(self.searches),
            notes=tuple(dict.fromkeys([*filter(None, failures), *self.notes])),
            comparison=comparison,
        )
