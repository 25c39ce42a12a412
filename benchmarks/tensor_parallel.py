"""The cost and gain of tensor parallelism: 1, 2 and 4 ranks, each with one thread.

python benchmarks/tensor_parallel.py --work-dir /tmp/tensor_parallel

wide is a random Llama of 7B's widths with a few layers, demo the bundled model. One answer and
eight at once are decoded from a short prompt, whose time is included. A token's time is the whole
time divided by all tokens, and its bytes are those that one rank passes to collectives. The time in
collectives includes waiting for slower ranks, which dominates with more ranks than cores. On a GPU
the device waits instead, and the last column has no meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from load_memory import TOKENIZER, MadeWeights, made_config
from rich.console import Console
from rich.table import Table

from minigpt4_runtime import Message, MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.folder import write_folder

QUESTION = [Message("user", ("What is in this picture?",))]


@dataclass(frozen=True)
class Result:
    """One model with one number of ranks and one number of answers at once."""

    model: str
    num_ranks: int
    num_answers: int
    token_seconds: float
    token_bytes: float
    collective_share: float


def decode(model: MiniGPT4, name: str, num_answers: int, num_tokens: int) -> Result:
    """Decode answers together, and measure time and traffic."""
    sampling = SamplingParams(ignore_eos=True, stop=(), max_new_tokens=num_tokens)
    earlier = model.probe.traffic()
    started = time.perf_counter()
    tickets = [model.submit(QUESTION, sampling) for _ in range(num_answers)]
    num_answered = 0
    for ticket in tickets:
        *_, last = ticket
        assert last.reply is not None, "a stream ends with its reply"
        num_answered += len(last.reply.token_ids)
    seconds = time.perf_counter() - started
    traffic = model.probe.traffic()
    return Result(
        name,
        model.tensor_parallel,
        num_answers,
        seconds / num_answered,
        (traffic.num_bytes - earlier.num_bytes) / num_answered,
        (traffic.seconds - earlier.seconds) / seconds,
    )


def measure(folder: Path | None, name: str, args: argparse.Namespace) -> list[Result]:
    """Measure one model with each number of ranks."""
    results = []
    num_tokens = args.tokens if folder else 4 * args.tokens
    for num_ranks in args.ranks:
        with MiniGPT4.load(
            folder, device=args.device, dtype=args.dtype, tensor_parallel=num_ranks
        ) as model:
            decode(model, name, 1, 4)
            for num_answers in (1, 8):
                print(f"{name}, {num_ranks} ranks, {num_answers} answers …", file=sys.stderr)
                results.append(decode(model, name, num_answers, num_tokens))
    return results


def show(results: list[Result]) -> Table:
    """Times as a ratio to those of the first number of ranks."""
    columns = ("model", "answers", "ranks", "ms/token", "speed-up", "KiB/token", "in collectives")
    table = Table(*columns)
    base = {(each.model, each.num_answers): each for each in reversed(results)}
    for each in sorted(results, key=lambda one: (one.model, one.num_answers, one.num_ranks)):
        first = base[each.model, each.num_answers]
        table.add_row(
            each.model, str(each.num_answers), str(each.num_ranks),
            f"{each.token_seconds * 1e3:.1f}", f"{first.token_seconds / each.token_seconds:.2f}",
            f"{each.token_bytes / 1024:.1f}", f"{each.collective_share:.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    """Measure, and print the table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="a folder for the wide model")
    parser.add_argument("--layers", type=int, default=4, help="of wide, 772 MiB each in float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer; demo: four times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    args = parser.parse_args()
    config, folder = made_config(args.layers), args.work_dir / "model"
    results = measure(None, "demo", args)
    try:
        weights = MadeWeights(model_shapes(config))
        write_folder(folder, config, weights, TOKENIZER, dtype=args.dtype, force=True)
        results += measure(folder, "wide", args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Console().print(show(results))
    if args.json:
        lines = [asdict(result) for result in results]
        args.json.write_text(json.dumps(lines, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
