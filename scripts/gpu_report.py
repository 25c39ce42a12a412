"""The results of benchmarks/gpu.py, as the tables of docs/performance.md.

python scripts/gpu_report.py DIR > tables.md

Takes  the folder that a run wrote. Needs only Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_KERNELS = 8
Result = Mapping[str, Any]
Cell = str | float | None


class GpuRun:
    """A run's record and results. A failed or unavailable result has no numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.record: dict[str, Any] = self._read("run.json")
        self.parts: dict[str, dict[str, Any]] = self.record["parts"]

    def _read(self, name: str) -> Any:
        return json.loads((self._folder / name).read_text("utf-8"))

    def results(self, part: str) -> list[dict[str, Any]]:
        """All results of a part."""
        path = self._folder / f"{part}.json"
        return self._read(path.name) if part in self.parts and path.exists() else []

    def numbers(self, part: str) -> dict[str, dict[str, Any]]:
        """The results of a part that have numbers."""
        return {
            each["name"]: each
            for each in self.results(part)
            if "error" not in each and "unavailable" not in each
        }

    @property
    def copied(self) -> float | None:
        """GB/s, read and written, when a large buffer is copied."""
        found = self.numbers("facts").get("copy")
        return found["gigabytes_per_second"] if found else None

    def multiplied(self, dtype: str) -> float | None:
        """TFLOP/s of a large product."""
        found = self.numbers("facts").get(dtype)
        return found["teraflops_per_second"] if found else None


def as_markdown(run: GpuRun) -> str:
    """All tables, and a list of missing results."""
    blocks = [heading(run)]
    for title, table in TABLES.items():
        lines = list(table(run))
        if len(lines) > 2:  # A head and its rule alone are no table.
            blocks.append("\n".join([f"**{title}**", "", *lines]))
    lacking = list(what_is_missing(run))
    if lacking:
        blocks.append("\n".join(["**Not measured, or failed**", "", *lacking]))
    return "\n\n".join(blocks) + "\n"


def heading(run: GpuRun) -> str:
    """The machine and the commit."""
    facts, packages = run.numbers("facts").get("machine", {}), run.record["packages"]
    card = facts.get("card", "no GPU")
    versions = ", ".join(
        f"{name} {packages[name]}"
        for name in ("torch", "triton", "transformers", "onnxruntime")
        if name in packages
    )
    dry = " (a dry run: no number means anything)" if run.record["is_dry"] else ""
    cuda = ""
    if "driver" in facts:
        cuda = f", driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
    kernel = f"; attention by {facts['attention']}" if "attention" in facts else ""
    return (
        f"### {card}, commit {run.record['commit']}{dry}\n\n"
        f"`python benchmarks/gpu.py`, {run.record['started']} UTC{cuda}; {versions}; Python "
        f"{run.record['python']}{kernel}; {facts.get('processor', 'unknown processor')}."
    )


# --- tables ---------------------------------------------------------------------------------------


def table_lines(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Iterator[str]:
    """Markdown: a head, a rule and the rows."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(show, row)) + " |"


def show(cell: Cell) -> str:
    """Three digits; None is a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def share(part: float, ceiling: float | None) -> str | None:
    """A share of a ceiling, if the ceiling was measured."""
    return f"{part / ceiling:.0%}" if ceiling else None


def ceilings(run: GpuRun) -> Iterator[str]:
    """The ceilings that everything else is compared with."""
    found = run.numbers("facts")
    rows: list[Sequence[Cell]] = []
    if run.copied:
        rows.append(("copy, read and written", run.copied, "GB/s"))
    rows += [
        (f"product, {name}", each["teraflops_per_second"], "TFLOP/s")
        for name, each in found.items()
        if "teraflops_per_second" in each
    ]
    rows += [
        (name, each["milliseconds"], "ms each")
        for name, each in found.items() if name.startswith("attention over")
    ]  # fmt: skip
    ways = ("overlapping", "one by one", "fetching nothing ahead")
    chain = found.get("overlap", {})
    rows += [(f"32 norms and products, {way}", chain[way], "ms") for way in ways if way in chain]
    return table_lines(("ceiling", "measured", ""), rows)


def tests(run: GpuRun) -> Iterator[str]:
    """Counts, and each failure."""
    rows = [
        (each["name"], each["passed"], each["failed"], each["skipped"],
         "whole" if each.get("status") in (0, 1) else "broken off")
        for part in ("kernels", "answers") for each in run.results(part) if "passed" in each
    ]  # fmt: skip
    yield from table_lines(("tests", "passed", "failed", "skipped", "run"), rows)
    for part in ("kernels", "answers"):
        for each in run.results(part):
            for failure in each.get("failures", ()):
                yield f"- `{failure['test']}`: {failure['why']}"


def demo_answers(run: GpuRun) -> Iterator[str]:
    """Exact answers of the demo model."""
    rows = [
        (name.removeprefix("demo "), group, f"{right} of {asked}", share(right, asked))
        for name, each in run.numbers("answers").items() if "right_of_asked" in each
        for group, (right, asked) in each["right_of_asked"].items()
    ]  # fmt: skip
    return table_lines(("demo model in", "what", "exactly right", ""), rows)


def language(run: GpuRun) -> Iterator[str]:
    """Rates compared with transformers, and as shares of the ceilings."""
    found = run.numbers("language")
    rows: list[Sequence[Cell]] = []
    for name, each in found.items():
        if "rates" not in each or name.endswith(", transformers"):
            continue
        theirs = found.get(f"{name}, transformers")
        ours_rate = statistics.median(each["rates"])
        their_rate = statistics.median(theirs["rates"]) if theirs else None
        ceiling = run.copied
        if each["unit"] == "GFLOP/s":
            products = run.multiplied("float16")
            ceiling = products and products * 1e3
        rows.append((
            name, ours_rate, their_rate, f"{ours_rate / their_rate:.2f}" if their_rate else None,
            share(ours_rate * each["cost"], ceiling),
            share(their_rate * each["cost"], ceiling) if their_rate else None,
            found.get(f"{name}, agreement", {}).get("tokens"),
        ))  # fmt: skip
    head = ("7B, float16", "tokens/s", "transformers", "ratio", "share of the ceiling",
            "theirs", "tokens alike")  # fmt: skip
    rows += [
        (name, median_rate(each), *[None] * 5)
        for name, each in run.numbers("fallback").items() if "rates" in each
    ]  # fmt: skip
    yield from table_lines(head, rows)
    if rows:
        yield ""
        yield (
            "The ceiling of decode is the copy, that of prefill the float16 product. With random "
            "weights in half precision the best two ids are often nearly alike: answers part where "
            "rounding decides."
        )


def attention(run: GpuRun) -> Iterator[str]:
    """Rows that decode as shares of the copy, prompts as shares of the large product."""
    rows: list[Sequence[Cell]] = []
    for name, each in run.numbers("attention").items():
        if not name.startswith("attention, "):
            continue
        read, made = each["gigabytes_per_second"], each["teraflops_per_second"]
        found = (read, "GB/s", share(read, run.copied))
        if not each["is_decode"]:
            found = (made, "TFLOP/s", share(made, run.multiplied("float16")))
        rows.append((name.removeprefix("attention, "), each["microseconds"], *found))
    head = ("attention of a layer: sequences × new tokens of all", "µs", "rate", "",
            "share of the ceiling")  # fmt: skip
    return table_lines(head, rows)


def products(run: GpuRun) -> Iterator[str]:
    """A few rows as shares of the copy, many as shares of the large product of their numbers."""
    rows: list[Sequence[Cell]] = []
    for name, each in run.numbers("products").items():
        if read := each.get("gigabytes_per_second"):
            found = ("GB/s", read, share(read, run.copied))
        else:
            made = each["teraflops_per_second"]
            found = ("TFLOP/s", made, share(made, run.multiplied(multiplied_in(name))))
        rows.append((name, each["microseconds"], found[1], found[0], found[2]))
    return table_lines(("product", "µs", "rate", "", "share of the ceiling"), rows)


def multiplied_in(name: str) -> str:
    """What tensor cores multiply in the product of many rows that has this name."""
    if name.startswith("w8a8-fp8"):
        return "float8_e4m3fn"
    return "int8" if name.startswith(("w8a8", "w4a8", "torch's 2:4 int8")) else "float16"


def in_two_ways(run: GpuRun, prefix: str) -> list[tuple[str, float | None, float | None]]:
    """What was timed under names that begin so: by torch, and in one launch, µs."""
    times: dict[str, dict[str, float]] = {}
    for name, each in run.numbers("attention").items():
        if name.startswith(prefix):
            what, _, way = name.removeprefix(prefix).rpartition(", ")
            times.setdefault(what, {})[way] = each["microseconds"]
    return [(what, found.get("torch"), found.get("one launch")) for what, found in times.items()]


def writes(run: GpuRun) -> Iterator[str]:
    """The time to turn and cache a layer's rows, in two ways."""
    rows = in_two_ways(run, "turn and cache, ")
    head = ("turning and caching of a layer: rows, cache", "torch, µs", "one launch, µs")
    return table_lines(head, rows)


def vision(run: GpuRun) -> Iterator[str]:
    """Pictures."""
    rows = [
        (
            name.rpartition(", ")[0],
            each["pictures"],
            each["milliseconds"],
            share(each["teraflops_per_second"], run.multiplied(side_multiplied_in(name))),
        )
        for name, each in run.numbers("vision").items()
        if "pictures" in each
    ]
    rows += [
        (name.rpartition(", ")[0], 1, each["milliseconds"], None)
        for name, each in run.numbers("compiled").items() if ", image side" in name
    ]  # fmt: skip
    return table_lines(("image side", "pictures at once", "ms", "share of the product"), rows)


def side_multiplied_in(name: str) -> str:
    """What tensor cores multiply in a way to encode pictures."""
    last = name.rpartition(", ")[0].split()[-1]
    return {"w8a8": "int8", "w8a8-fp8": "float8_e4m3fn"}.get(last, last)


def picture(run: GpuRun) -> Iterator[str]:
    """From a picture to the first token."""
    rows = [
        (name, each.get("milliseconds"), each.get("tokens_per_second"))
        for name, each in run.numbers("picture").items()
    ]
    return table_lines(("7B, float16, pictures", "ms", "tokens/s"), rows)


def server(run: GpuRun) -> Iterator[str]:
    """The demo model under load."""
    rows = [
        (each["clients"], each["requests"] / each["seconds"], each["tokens_per_second"],
         each["first_ms"]["p50"], each["first_ms"]["p99"],
         each["token_ms"]["p50"], each["token_ms"]["p99"])
        for each in run.numbers("server").values()
    ]  # fmt: skip
    head = ("clients", "requests/s", "tokens/s", "first token p50 ms", "p99", "later p50 ms", "p99")
    return table_lines(head, rows)


def profile(run: GpuRun) -> Iterator[str]:
    """The time by kernel, and the GPU's idle time."""
    found = run.numbers("profile")
    rows = [
        (name, each["milliseconds"], each["operations"], each["busy_ms"],
         max(0.0, each["milliseconds"] - each["busy_ms"]), each["longest_gap_ms"])
        for name, each in found.items()
    ]  # fmt: skip
    head = ("what", "ms", "operations on the device", "busy ms", "idle ms",
            "longest gap ms, under the profiler")  # fmt: skip
    yield from table_lines(head, rows)
    if rows:
        yield ""
    for name, each in found.items():
        yield f"- {name}:"
        for kernel in each["kernels"][:SHOWN_KERNELS]:
            yield f"  - {show(kernel['ms'])} ms in {kernel['calls']} × `{kernel['kernel'][:80]}`"


def compiled(run: GpuRun) -> Iterator[str]:
    """The decode step in several ways."""
    cells: dict[str, dict[str, float]] = {}
    for name, each in run.numbers("compiled").items():
        way, _, what = name.partition(", ")
        cells.setdefault(what, {})[way] = each["milliseconds"]
    ways = (
        "engine", "engine without graphs", "eager", "graph", "graph without overlap",
        "torch.compile",
    )  # fmt: skip
    rows = [(what, *(found.get(way) for way in ways)) for what, found in cells.items()]
    return table_lines(("decode step, ms", *ways), rows)


def tuning(run: GpuRun) -> Iterator[str]:
    """Training."""
    rows = [
        (name, each["peak_gibibytes"], each["tokens_per_second"])
        for name, each in run.numbers("tuning").items()
    ]
    return table_lines(("7B learns, LoRA and projection", "peak, GiB", "tokens/s"), rows)


def choices(run: GpuRun) -> Iterator[str]:
    """The time to choose a step's ids, in two ways."""
    rows = in_two_ways(run, "ids, ")
    return table_lines(("ids of rows of 32,000", "torch, µs", "one launch, µs"), rows)


def quantised(run: GpuRun) -> Iterator[str]:
    """Decode in formats beside float16."""
    floats = run.numbers("language")
    rows: list[Sequence[Cell]] = []
    for name, each in run.numbers("quantised").items():
        rate, plain = median_rate(each), median_rate(floats.get(name.partition(",")[0]))
        if rate is not None:
            times = f"{rate / plain:.2f}" if plain else None
            rows.append((name, rate, times, share(rate * each["cost"], run.copied)))
    return table_lines(("7B, quantised", "tokens/s", "times float16", "share of the copy"), rows)


def rival(run: GpuRun) -> Iterator[str]:
    """Decode of a few layers, in three ways."""
    found = run.numbers("rival")
    rows = [
        (name, *(median_rate(found.get(name + kind)) for kind in ("", ", static", ", compiled")))
        for name in found if ", " not in name
    ]  # fmt: skip
    head = ("8 layers of a 7B, tokens/s", "ours", "transformers, fixed cache", "the same, compiled")
    return table_lines(head, rows)


def start(run: GpuRun) -> Iterator[str]:
    """The loading of a folder."""
    rows = [(name, each["gigabytes_per_second"]) for name, each in run.numbers("start").items()]
    return table_lines(("start", "GB/s"), rows)


def reached(run: GpuRun) -> Iterator[str]:
    """What was to be reached, and what was: at least, or, of milliseconds, at most."""
    rivals = run.numbers("rival")
    small, pictures, rates = (run.numbers(part) for part in ("quantised", "picture", "start"))
    language = run.numbers("language")
    one, many = language.get("decode1"), median_rate(language.get("decode64"))
    alone, product = median_rate(one), run.multiplied("float16")
    prefill = language.get("prefill in one step") or language.get("prefill")
    ways = {**run.numbers("vision"), **run.numbers("compiled")}
    sides = [
        each["milliseconds"]
        for name, each in ways.items()
        if each.get("pictures") == 1 or ", image side" in name
    ]
    starts = {name: each["gigabytes_per_second"] for name, each in rates.items()}
    files = [rate for name, rate in starts.items() if name.startswith("file")]
    # More threads than load a model may read a file faster.
    limits = starts.get("link"), max(files, default=None)
    slower = min((rate for rate in limits if rate), default=None)
    found: dict[str, tuple[float | None, float]] = {
        "decode, one answer, share of the copy": (of(cost_in_a_second(one), run.copied), 0.85),
        "w8a16, times float16": (of(median_rate(small.get("decode1, w8a16")), alone), 1.7),
        "w4a16-g128, times float16": (
            of(median_rate(small.get("decode1, w4a16-g128")), alone), 2.6,
        ),
        "64 answers, tokens/s": (many, 8000),
        "64 answers, times transformers": (
            of(many, median_rate(language.get("decode64, transformers"))), 3,
        ),
        "64 answers of 8 layers, times transformers compiled": (
            of(*(median_rate(rivals.get(f"decode64{kind}")) for kind in ("", ", compiled"))), 3,
        ),
        "64 answers about new pictures, tokens/s": (
            pictures.get("many answers", {}).get("tokens_per_second"), 8000,
        ),
        "prefill, share of the product": (
            of(cost_in_a_second(prefill), product and product * 1e3), 0.6,
        ),
        "one picture, ms": (min(sides, default=None), 2),
        "first token after a picture, ms": (
            pictures.get("first token", {}).get("milliseconds"), 20,
        ),
        "start, share of the slower of link and file": (
            of(starts.get("load"), slower), 0.9,
        ),
    }  # fmt: skip
    rows: list[Sequence[Cell]] = []
    for what, (measured, bar) in found.items():
        is_most = what.endswith("ms")
        is_met = measured is not None and (measured <= bar if is_most else measured >= bar)
        answer = None if measured is None else "yes" if is_met else "no"
        rows.append((what, measured, f"{'≤' if is_most else '≥'} {bar:g}", answer))
    return table_lines(("what was to be reached", "measured", "wanted", "reached"), rows)


def median_rate(result: Result | None) -> float | None:
    """The median of a result's repeats, if there is one."""
    return statistics.median(result["rates"]) if result and "rates" in result else None


def cost_in_a_second(result: Result | None) -> float | None:
    """The least that a result's tokens cost in a second: GB or GFLOP."""
    rate = median_rate(result)
    return rate * result["cost"] if result and rate else None


def of(part: float | None, whole: float | None) -> float | None:
    """A ratio of what was measured."""
    return part / whole if part is not None and whole else None


TABLES: dict[str, Callable[[GpuRun], Iterator[str]]] = {
    "What was to be reached": reached,
    "Ceilings": ceilings,
    "Tests": tests,
    "Exact answers": demo_answers,
    "Language model": language,
    "Attention": attention,
    "Quantised": quantised,
    "Keys and values": writes,
    "Choice of ids": choices,
    "Products": products,
    "Image side": vision,
    "First token": picture,
    "Start": start,
    "Beside transformers": rival,
    "Server, demo model": server,
    "Profile": profile,
    "Decode step": compiled,
    "Training": tuning,
}


def what_is_missing(run: GpuRun) -> Iterator[str]:
    """Parts that failed, and results without a number."""
    for part, outcome in run.parts.items():
        if outcome["status"] != "done":
            yield f"- {part}: {outcome['status']} after {outcome['seconds']:.0f} s"
        for each in run.results(part):
            if why := each.get("error") or each.get("unavailable"):
                yield f"- {part}, {each['name']}: {why}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what benchmarks/gpu.py wrote")
    folder = parser.parse_args().folder
    try:
        print(as_markdown(GpuRun(folder)), end="")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{folder} holds no whole run of benchmarks/gpu.py ({error!r}).")


if __name__ == "__main__":
    main()
