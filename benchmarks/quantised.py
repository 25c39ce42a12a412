"""Quantised weights in our engine compared with llama.cpp's: 7B's widths, random weights.

python benchmarks/quantised.py --llama PYTHON [--layers 8] [--only decode1,prefill] [--json FILE]

PYTHON is that of an environment of its own with llama-cpp-python, gguf and pyyaml. Both sides round
the layers and the head; they take turns, one works while the other waits.
decode1, decode8   new tokens per second of 1 or 8 answers after prompts of 16 tokens
prefill            tokens per second of a prompt of 512

The table shows the bytes of weights that a side reads for each step, as a share of the best rate at
which this machine reads, measured in the same run, and the peak memory of this process during a
work: ours, mapped files included, without llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine import Work, decode_rate, prefill_rate
from rivals import Ours, in_own_thread, wide_config

from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.machine import processor_name

PAIRS = {"w8a8": "Q8_0", "w4a8-g32": "Q4_0", "w4a8-g128": "Q4_0"}
SCRIPT = Path(__file__).with_name("quantised_llama.py")


def works(num_new: int) -> list[Work]:
    """All works; their answers have `num_new` tokens."""
    return [
        Work("decode1", [16], [num_new], decode_rate),
        Work("decode8", [16] * 8, [num_new] * 8, decode_rate),
        Work("prefill", [512], [1], prefill_rate),
    ]


class Llama:
    """llama.cpp with a model in a format, in a process of its own."""

    def __init__(self, python: str, **wanted: Any) -> None:
        self._process = subprocess.Popen(
            [python, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self.num_bytes: int = self._ask(wanted)["bytes"]

    def rate(self, work: Work) -> float:
        """In tokens per second."""
        seconds = self._ask({"prompts": work.lengths, "new": work.counts[0]})
        if work.is_decode:
            return sum(count - 1 for count in work.counts) / float(seconds["others"])
        return sum(work.lengths) / float(seconds["first"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def _ask(self, line: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True)
class Row:
    """The rates of both sides at one work, in tokens per second, and the share of what is read.

    `our_peak_bytes` is None if the system does not tell.
    """

    weights: str
    rival: str
    work: str
    ours: list[float]
    theirs: list[float]
    our_share: float | None
    their_share: float | None
    our_peak_bytes: int | None

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


def compare(weights: str, args: argparse.Namespace, read_per_second: float) -> list[Row]:
    """All works in one format."""
    ours = Ours(
        wide_config(args.layers), device="cpu", dtype="float32", num_blocks=256,
        formats={"language.layers": weights, "language.head": weights},
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = str(args.folder or made)
        theirs = Llama(
            args.llama, folder=folder, layers=args.layers, format=PAIRS[weights],
            threads=torch.get_num_threads(),
        )  # fmt: skip
        for work in works(args.new):
            if args.only and work.name not in args.only:
                continue
            ours.reset_peak_memory()
            mine, others = take_turns(work, ours, theirs, repeats=args.repeats)
            row = Row(
                weights, PAIRS[weights], work.name, mine, others,
                share_read(work, mine, read_bytes(ours), read_per_second),
                share_read(work, others, their_read_bytes(theirs, args.layers), read_per_second),
                ours.peak_memory_bytes(),
            )  # fmt: skip
            print(show(row), flush=True)
            rows.append(row)
        theirs.close()
    return rows


def take_turns(
    work: Work, ours: Ours, theirs: Llama, *, repeats: int
) -> tuple[list[float], list[float]]:
    """The rates of both sides, in tokens per second. A first turn, which warms up, is left out."""
    rates: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        prompts = work.prompts(ours.language.config.vocab_size, repeat)
        rates[0].append(work.rate(ours.generate(prompts, work.counts), work))
        ours.rest()
        rates[1].append(theirs.rate(work))
    return rates[0][1:], rates[1][1:]


def share_read(
    work: Work, rates: list[float], num_bytes: float, read_per_second: float
) -> float | None:
    """The bytes read for each step, as a share of what could be; None where nothing is decoded."""
    if not work.is_decode:
        return None
    steps_per_second = statistics.median(rates) / len(work.lengths)
    return num_bytes * steps_per_second / read_per_second


def read_bytes(ours: Ours) -> int:
    """The bytes of weights that a step of one row reads: layers and head."""
    language = ours.language
    return sum(each.nbytes for each in (*language.layers.parameters(), *language.head.parameters()))


def their_read_bytes(theirs: Llama, num_layers: int) -> float:
    """The same of llama.cpp: its file without the embeddings, of which a step reads a row."""
    table = 32000 * 4096 * (theirs.num_bytes / total_numbers(num_layers, tables=2))
    return theirs.num_bytes - table


def total_numbers(num_layers: int, *, tables: int) -> int:
    """How many weights the layers, and so many tables of the vocabulary, have."""
    return num_layers * (4 * 4096**2 + 3 * 4096 * 11008) + tables * 32000 * 4096


def show(row: Row) -> str:
    """A line of the table."""
    shares = ["" if each is None else f"{each:5.0%}" for each in (row.our_share, row.their_share)]
    spread = " ".join(
        f"{statistics.median(each):7.1f} ({min(each):.1f}–{max(each):.1f})"
        for each in (row.ours, row.theirs)
    )
    names = f"{row.weights:9} {row.rival:6} {row.work:8}"
    peak = "" if row.our_peak_bytes is None else f"{row.our_peak_bytes / 2**30:.2f} GiB"
    return f"{names} {spread}  {row.ratio:5.2f}  {' '.join(shares)}  {peak}".rstrip()


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama", required=True, help="Python of the other environment")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(PAIRS))
    parser.add_argument("--folder", type=Path, help="keeps llama.cpp's files for the next run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    best = measure_ceilings("cpu", "float32").gigabytes_per_second
    print(f"{processor_name()}, {args.threads} threads, {best:.1f} GB/s read at best")
    print(
        "ours      theirs work     tokens/s: ours, theirs (lowest–highest); ratio; shares of that; "
        "our peak memory"
    )
    rows = [
        row
        for weights in args.formats
        for row in in_own_thread(partial(compare, weights, args, best * 1e9))
    ]
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
