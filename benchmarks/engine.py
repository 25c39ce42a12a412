"""The engine compared with transformers' `generate` or with vLLM: same weights, threads and dtype.

python benchmarks/engine.py --model demo
python benchmarks/engine.py --model wide --layers 8 --json wide.json
python benchmarks/engine.py --model wide --layers 8 --vllm PYTHON

transformers runs in the same process, vLLM in one of its own, by the Python of its environment.

wide is a Llama of 7B's widths with random weights, demo the bundled model. Prompts are random ids,
new ones in each repeat, and nothing is cached between them. The two sides take turns.
decode1, decode8   new tokens per second of 1 or 8 answers, while all of them are growing
prefill            prompt tokens a second until the first new token
mixed              requested tokens per second; prompts of 16 to 128 tokens and answers of 8 to 256
                   are submitted at once; transformers answers them in padded batches of 8

The table also shows the bytes read (decode) or the operations done (prefill, mixed) as a share of
the machine's best rate, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rivals import (
    SETTINGS,
    Ours,
    Rival,
    TimedAnswers,
    Transformers,
    Vllm,
    in_own_thread,
    wide_config,
)

from minigpt4_runtime.bench.ceilings import Ceilings, measure_ceilings
from minigpt4_runtime.bench.machine import processor_name
from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.config import DTYPE_NAMES
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.model.llama import Llama

BATCH = 8

# --- the works ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The tokens of each prompt and of each answer, and the rate that is measured.

    transformers answers it in batches of `batch_size`.
    """

    name: str
    lengths: list[int]
    counts: list[int]
    rate: Callable[[TimedAnswers, Work], float]  # In tokens per second.
    batch_size: int = BATCH

    @property
    def unit(self) -> str:
        """The unit of a token's cost."""
        return "GB/s" if self.is_decode else "GFLOP/s"

    @property
    def is_decode(self) -> bool:
        """Whether the speed is limited by reading weights."""
        return self.name.startswith("decode")

    def prompts(self, vocab_size: int, repeat: int) -> list[list[int]]:
        """Random ids; none of them is a control id."""
        rng = random.Random(f"{self.name}/{repeat}")
        return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in self.lengths]


def decode_rate(answered: TimedAnswers, _: Work) -> float:
    """Tokens per second from the latest first token to the earliest last token."""
    start = max(times[0] for times in answered.times)
    end = min(times[-1] for times in answered.times)
    return sum(start < at <= end for times in answered.times for at in times) / (end - start)


def prefill_rate(answered: TimedAnswers, work: Work) -> float:
    """Prompt tokens per second until the first new token."""
    return sum(work.lengths) / (answered.times[0][0] - answered.started)


def whole_rate(answered: TimedAnswers, work: Work) -> float:
    """Requested tokens per second until the last token."""
    return sum(work.counts) / (max(times[-1] for times in answered.times) - answered.started)


def works(num_new: int, num_requests: int) -> list[Work]:
    """All Works, with decoded answers of `num_new` tokens."""
    rng = random.Random(0)
    return [
        Work("decode1", [128], [num_new], decode_rate),
        Work(f"decode{BATCH}", [128] * BATCH, [num_new] * BATCH, decode_rate),
        Work("prefill", [512], [1], prefill_rate),
        Work(
            "mixed",
            [rng.randint(16, 128) for _ in range(num_requests)],
            [rng.randint(8, 256) for _ in range(num_requests)],
            whole_rate,
        ),
    ]


def cost(work: Work, language: Llama) -> float:
    """The least cost of one of a work's tokens: GB read, or GFLOP."""
    config, layers, head = language.config, language.layers.parameters(), language.head.weight
    layer_bytes = layer_numbers = 0
    for weight in layers:
        layer_bytes, layer_numbers = layer_bytes + weight.nbytes, layer_numbers + weight.numel()
    if work.is_decode:
        # All prompts are as long: in the mean, half of the answer is read beside them.
        dtype: Any = str(head.dtype).removeprefix("torch.")
        cached = (work.lengths[0] + work.counts[0] / 2) * token_bytes(config, dtype)
        return (cached + (layer_bytes + head.nbytes) / len(work.lengths)) / 1e9
    flops = 0.0
    for length, count in zip(work.lengths, work.counts, strict=True):
        computed = length + count - 1  # The last new token is never read.
        pairs = computed * (computed + 1) / 2
        flops += 2 * layer_numbers * computed + 2 * head.numel() * count
        flops += 4 * config.hidden_size * config.num_hidden_layers * pairs
    return flops / sum(work.lengths if work.name == "prefill" else work.counts) / 1e9


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Rates in tokens per second, one for each repeat. `ceiling` is in `unit`, as `cost` is."""

    model: str
    rival: str
    work: str
    ours: list[float]
    theirs: list[float]
    cost: float
    unit: str
    ceiling: float
    equal_tokens: float


def equal_share(ours: TimedAnswers, theirs: TimedAnswers) -> float:
    """The share of tokens that are equal at the same position."""
    pairs = [
        (one, other)
        for mine, yours in zip(ours.token_ids, theirs.token_ids, strict=True)
        for one, other in zip(mine, yours, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def measure(
    work: Work, ours: Ours, theirs: Rival, *, repeats: int
) -> tuple[list[float], list[float], float]:
    """Rates of both sides, measured in turns, and the share of equal tokens.

    Other prompts of the same lengths, with short answers, warm up each side.
    """
    vocab_size = ours.language.config.vocab_size
    rates: tuple[list[float], list[float]] = ([], [])
    shares = []
    for repeat in range(repeats):
        prompts = work.prompts(vocab_size, repeat)
        others = work.prompts(vocab_size, -1 - repeat)[: work.batch_size]
        few = [min(4, count) for count in work.counts[: work.batch_size]]
        ours.generate(others, few)
        mine = ours.generate(prompts, work.counts)
        ours.rest()

        def answer() -> TimedAnswers:
            theirs.generate(others, few, batch_size=work.batch_size)  # noqa: B023
            return theirs.generate(prompts, work.counts, batch_size=work.batch_size)  # noqa: B023

        yours = in_own_thread(answer)
        rates[0].append(work.rate(mine, work))
        rates[1].append(work.rate(yours, work))
        shares.append(equal_share(mine, yours))
    return (*rates, statistics.mean(shares))


def measure_model(name: str, args: argparse.Namespace, ceilings: Ceilings) -> list[Result]:
    """All works on one model."""
    config = wide_config(args.layers) if name == "wide" else None
    ours = in_own_thread(lambda: Ours(config, device=args.device, dtype=args.dtype))

    def open_rival() -> Rival:
        return (
            Vllm(ours.language, args.vllm) if args.vllm else Transformers(ours.language, args.rival)
        )

    theirs = in_own_thread(open_rival)
    results = []
    for work in works(32 if name == "wide" else 128, args.requests):
        if args.only and work.name not in args.only:
            continue
        print(f"{name} {work.name} …", file=sys.stderr)
        mine, yours, equal = measure(work, ours, theirs, repeats=args.repeats)
        ceiling = ceilings.gigabytes_per_second
        if not work.is_decode:
            ceiling = ceilings.gigaflops_per_second
        price = cost(work, ours.language)
        results.append(
            Result(name, theirs.name, work.name, mine, yours, price, work.unit, ceiling, equal)
        )
    return results


# --- showing ------------------------------------------------------------------------------------


def machine_line(args: argparse.Namespace) -> str:
    """The machine, torch's version and the commit."""
    device = processor_name()
    if args.device != "cpu":
        device = f"{torch.cuda.get_device_name()}, {device}"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return (
        f"{device}, {os.cpu_count()} cores, {args.threads} threads, {args.dtype}; torch "
        f"{torch.__version__}; commit {commit.stdout.strip() or 'unknown'}"
    )


def show_rates(rates: list[float]) -> str:
    """Median and spread."""
    digits = 1 if statistics.median(rates) < 1000 else 0
    numbers = (statistics.median(rates), min(rates), max(rates))
    middle, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{middle} ({low}–{high})"


def as_row(result: Result) -> tuple[str, ...]:
    """A result as the table's cells."""
    ours, theirs = statistics.median(result.ours), statistics.median(result.theirs)
    mine, yours = ours * result.cost, theirs * result.cost
    return (
        result.model, result.rival, result.work, show_rates(result.ours), show_rates(result.theirs),
        f"{ours / theirs:.2f}", f"{mine:.1f}", f"{yours:.1f}", result.unit,
        f"{mine / result.ceiling:.0%}", f"{yours / result.ceiling:.0%}",
        f"{result.equal_tokens:.1%}",
    )  # fmt: skip


def as_table(results: list[Result]) -> str:
    """All results, aligned."""
    header = (
        "model", "rival", "work", "ours tokens/s", "theirs tokens/s", "ratio", "ours", "theirs", "",
        "ours", "theirs", "equal tokens",
    )  # fmt: skip
    rows = [header, *map(as_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index in (0, 1, 2, 8) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("wide", "demo", "all"), default="all")
    parser.add_argument("--layers", type=int, default=8, help="of wide, 772 MiB each in float32")
    parser.add_argument("--only", type=lambda text: text.split(","), help="works, with commas")
    parser.add_argument("--requests", type=int, default=64, help="of mixed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rival", choices=SETTINGS, default="dynamic", help="transformers' cache")
    parser.add_argument("--vllm", metavar="PYTHON", help="compare with vLLM, in its environment")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    args = parser.parse_args()
    known = [work.name for work in works(1, 1)]
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(known)}.")
    if args.vllm and args.model != "wide":
        parser.error("--vllm goes with --model wide: vLLM has no heads as narrow as demo's.")
    return args


def main() -> None:
    """Measure, and print the table."""
    args = read_arguments()
    torch.set_num_threads(args.threads)
    try:
        machine = machine_line(args)
        open_device(args.device)
    except BackendUnavailableError as error:
        sys.exit(str(error))
    ceilings = measure_ceilings(args.device, args.dtype)
    results = []
    for name in ("demo", "wide") if args.model == "all" else (args.model,):
        results += measure_model(name, args, ceilings)
    print(
        f"{machine}\nAt best: {ceilings.gigabytes_per_second:.1f} GB/s read, "
        f"{ceilings.gigaflops_per_second:.0f} GFLOP/s. Median (lowest–highest) of {args.repeats}.\n"
    )
    print(as_table(results))
    if args.json:
        report = {
            "machine": machine,
            "ceilings": asdict(ceilings),
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
