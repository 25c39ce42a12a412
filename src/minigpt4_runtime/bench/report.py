"""A bench run and its report: text for a terminal, CSV, JSON and a page.

Owns   the facts of a run, the columns that the table shows, the JSON's layout, and the sentences
       around the numbers.
Takes  measured points, searches and notes; gives text, tables, mappings and a page.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.bench.ceilings import Ceilings, measure_ceilings
from minigpt4_runtime.bench.comparison import Comparison, OldReport, compare
from minigpt4_runtime.bench.language import BatchSearch
from minigpt4_runtime.bench.machine import GIB, machine_facts
from minigpt4_runtime.bench.spread import Measured
from minigpt4_runtime.report.page import Block, Paragraph, render
from minigpt4_runtime.report.table import Column, Table

FORMAT_VERSION = 1
_MEMORY = ("peak_memory_bytes", Column("peak GiB", ".2f"))
SHOWN: dict[str, tuple[tuple[str, Column], ...]] = {
    "bench vision": (
        ("runtime", Column("runtime")),
        ("start", Column("start")),
        ("batch_size", Column("batch")),
        ("latency_ms", Column("ms/image", ".1f")),
        ("latency_p50_ms", Column("p50", ".1f")),
        ("latency_p90_ms", Column("p90", ".1f")),
        ("latency_p99_ms", Column("p99", ".1f")),
        ("decode_ms", Column("decode", ".1f")),
        ("preprocess_ms", Column("preprocess", ".1f")),
        ("tower_ms", Column("tower", ".1f")),
        ("projection_ms", Column("projection", ".2f")),
        ("encode_ms", Column("encode", ".1f")),
        ("images_per_second", Column("images/s", ".2f")),
        ("gigaflops_per_second", Column("GFLOP/s", ".0f")),
        ("ceiling_share", Column("of ceiling", ".0%")),
        ("load_ms", Column("load ms", ".0f")),
        _MEMORY,
    ),
    "bench language": (
        ("batch_size", Column("batch")),
        ("input_length", Column("input")),
        ("output_length", Column("output")),
        ("response_time_ms", Column("response ms", ".1f")),
        ("first_token_ms", Column("first token ms", ".1f")),
        ("per_token_ms", Column("later token ms", ".2f")),
        ("per_token_p50_ms", Column("p50", ".2f")),
        ("per_token_p90_ms", Column("p90", ".2f")),
        ("per_token_p99_ms", Column("p99", ".2f")),
        ("tokens_per_second", Column("tokens/s", ".1f")),
        ("decode_tokens_per_second", Column("decode only", ".1f")),
        ("gigabytes_per_second", Column("GB/s", ".1f")),
        ("bandwidth_share", Column("of ceiling", ".0%")),
        _MEMORY,
    ),
    "bench describe": (
        ("num_images", Column("images")),
        ("num_failed", Column("failed")),
        ("seconds", Column("seconds", ".2f")),
        ("images_per_second", Column("images/s", ".2f")),
        ("tokens_per_second", Column("tokens/s", ".1f")),
        ("ms_per_image", Column("ms/image", ".1f")),
        ("tokens_per_image", Column("tokens/image", ".1f")),
        _MEMORY,
    ),
}


@dataclass
class BenchRun:
    """All that one run has measured so far. `tell` shows a line to the user.

    `facts` name model and machine; `notes` are further sentences.
    """

    kind: str
    command: str
    facts: Mapping[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    measured: list[Measured[Any]] = field(default_factory=list)
    searches: list[BatchSearch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    made_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    tell: Callable[[str], object] = print
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

    def report(self, old: OldReport | None = None) -> Self:
        """Complete the report of at least one point, and compare it with an older one."""
        failures = (getattr(each.point, "failure", None) for each in self.measured)
        self.notes = list(dict.fromkeys([*filter(None, failures), *self.notes]))
        # Neither ceiling limits the whole job.
        if self.kind != "bench describe":
            self.ceilings = measure_ceilings(*self._place)
        if old is not None:
            self.comparison = compare(old, self.measured, self.facts)
        return self

    def remarks(self) -> list[str]:
        """The sentences below the table."""
        lines = [each.as_text() for each in self.searches]
        if self.ceilings is not None:
            lines.append(
                f"Ceilings measured in this run: {self.ceilings.gigabytes_per_second:.1f} GB/s "
                f"read, {self.ceilings.gigaflops_per_second:.0f} GFLOP/s in a matrix product."
            )
        lines += self.notes
        if self.comparison is not None:
            lines += [f"Different then: {each}." for each in self.comparison.differences]
            if not self.comparison.changes:
                lines.append(f"Nothing in {self.comparison.old.path} was measured here too.")
        return lines

    def as_text(self) -> str:
        """Facts, tables and remarks."""
        blocks = [
            "\n".join(f"{name}: {fact}" for name, fact in self.facts.items()),
            self.shown().as_text(),
            "\n".join(self.remarks()),
        ]
        if self.comparison is not None and self.comparison.changes:
            blocks.append(self.comparison.as_table().as_text())
        return "\n\n".join(block for block in blocks if block)

    def shown(self) -> Table:
        """The most important fields, with readable headings."""
        names = SHOWN[self.kind]
        rows = []
        for each in self.measured:
            values = dataclasses.asdict(each.point)
            if values["peak_memory_bytes"] is not None:
                values["peak_memory_bytes"] /= GIB
            rows.append(tuple(values[name] for name, _ in names))
        return Table(tuple(column for _, column in names), tuple(rows))

    def as_rows(self) -> Table:
        """Every field of every point; the headings are the field names."""
        names = [each.name for each in dataclasses.fields(self.measured[0].point)]
        rows = tuple(tuple(getattr(each.point, n) for n in names) for each in self.measured)
        return Table(tuple(map(Column, names)), rows)

    def as_mapping(self) -> dict[str, Any]:
        """Everything, as JSON; `--compare` reads it back."""
        return {
            "report": self.kind,
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "made_at": self.made_at,
            "facts": dict(self.facts),
            "ceilings": dataclasses.asdict(self.ceilings) if self.ceilings else None,
            "points": [each.as_mapping() for each in self.measured],
            "searches": [each.as_mapping() for each in self.searches],
            "notes": list(self.notes),
        }

    def as_page(self) -> str:
        """The same with plots, as a self-contained HTML page."""
        from minigpt4_runtime.bench.plots import draw_plots

        facts = Table((Column(""), Column("")), (("command", self.command), *self.facts.items()))
        blocks: list[Block] = [
            facts,
            *draw_plots(self),
            self.shown(),
            *map(Paragraph, self.remarks()),
        ]
        if self.comparison is not None and self.comparison.changes:
            blocks.append(self.comparison.as_table())
        return render(f"minigpt4 {self.kind}", blocks)
