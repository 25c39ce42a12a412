"""The speed of the sampler.

Run    python benchmarks/sampling.py [--device cuda], on an idle machine.
Gives  for each number of rows and each kind of request, the median time for a step's tokens.

The logits are on the device before the clock starts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.sampler import Sampler
from minigpt4_runtime.engine.sequence import Sequence as Answer

BOS, EOS = 1, 2
KINDS = {
    "greedy": SamplingParams(),
    "top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
    "repetition penalty 1.2": SamplingParams(repetition_penalty=1.2),
    "both": SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2),
}


def answers(params: SamplingParams, count: int, *, length: int, vocab_size: int) -> list[Answer]:
    """A number of answers in progress, each with its own seed and tokens."""
    words = torch.randint(
        vocab_size, (count, length), generator=torch.Generator().manual_seed(count)
    )
    found = []
    for number in range(count):
        answer = Answer(number, Request((BOS,), (), params), seed=number, max_new_tokens=300)
        answer.branches[0].answer += words[number].tolist()
        found.append(answer)
    return found


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of a function, after one warm-up."""
    times: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Measure all kinds for all numbers of rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--said", type=int, default=100, help="tokens said so far (default 100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler = Sampler(bos_id=BOS, eos_id=EOS)
    table = Table("request", "rows", "ms")
    for name, params in KINDS.items():
        for count in args.rows:
            asked = answers(params, count, length=args.said, vocab_size=args.vocabulary)
            logits = 3 * torch.randn(count, args.vocabulary, device=args.device)
            seconds = median_seconds(partial(sampler.pick, logits, asked), args.repeats)
            table.add_row(name, str(count), f"{1000 * seconds:.3f}")
    Console().print(f"V = {args.vocabulary}, {args.device}, {args.threads} threads")
    Console().print(table)


if __name__ == "__main__":
    main()
