"""A bench run in progress, which can be reported at any moment.

Owns   the facts and notes of the run.
Takes  points, searches and notes, and shows each point in a line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.comparison import OldReport, compare
from minigpt4_runtime.bench.machine import machine_facts
from minigpt4_runtime.bench.report import BenchReport
from minigpt4_runtime.bench.spread import Measured


@dataclass(kw_only=True)
class BenchRun(BenchReport):
    """A report that grows. `tell` shows a line to the user."""

    tell: Callable[[str], object]
    _place: tuple[str, str] = field(default=("cpu", "float32"), init=False)

    def load(self, load: Callable[[], MiniGPT4], *, name: str) -> MiniGPT4:
        """Load the model to measure, and note its sizes and its device."""
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
        """Keep and show one more point."""
        self.measured.append(measured)
        self.tell(measured.as_text())

    def report(self, old: OldReport | None = None) -> BenchReport:
        """Complete the report of at least one point, and compare it with an older one."""
        failures = (getattr(each.point, "failure", None) for each in self.measured)
        self.notes = list(dict.fromkeys([*filter(None, failures), *self.notes]))
        # Neither ceiling limits the whole job.
        if self.kind != "bench describe":
            self.ceilings = measure_ceilings(*self._place)
        if old is not None:
            self.comparison = compare(old, self.measured, self.facts)
        return self
