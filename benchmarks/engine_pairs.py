"""The engine of one checkout compared with that of another, on the works of engine.py.

python benchmarks/engine_pairs.py --before DIR [--after DIR] [--model wide --layers 1] [--threads 1]

Each checkout runs in a process of its own. One works while the other waits, and each pair begins
with the other one. The table shows the ratio of times, after to before: the median of the pairs
with its quartiles, and the ratio of medians. A checkout beside itself (--after DIR, the same one)
shows what such a ratio varies by. Where other programs run too, --processor-time with one thread
leaves out the time in which they had the processor.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WORKS = ("decode1", "decode8", "prefill", "mixed")


def work_of(name: str, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The tokens of each prompt and of each answer."""
    rng = random.Random(0)
    mixed = range(args.requests)
    return {
        "decode1": ([128], [args.new]),
        "decode8": ([128] * 8, [args.new] * 8),
        "prefill": ([512], [1]),
        "mixed": ([rng.randint(16, 128) for _ in mixed], [rng.randint(8, 256) for _ in mixed]),
    }[name]


def serve(args: argparse.Namespace) -> None:
    """The process of a checkout: for each line with a work and a seed, the seconds it takes."""
    import torch
    from rivals import Ours, wide_config

    torch.set_num_threads(args.threads)
    config = wide_config(args.layers) if args.model == "wide" else None
    num_blocks = 1024 if config else None
    clock = time.process_time if args.processor_time else time.perf_counter
    ours = Ours(config, device="cpu", dtype=args.dtype, num_blocks=num_blocks)
    print("ready", flush=True)
    for line in sys.stdin:
        name, seed = line.split()
        lengths, counts = work_of(name, args)
        rng = random.Random(seed)
        vocab_size = ours.language.config.vocab_size
        prompts = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
        started = clock()
        ours.generate(prompts, counts)
        print(clock() - started, flush=True)


class Checkout:
    """A checkout's engine in a process of its own, which imports that checkout alone."""

    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join(str(folder.resolve() / name) for name in ("src", "benchmarks"))
        self._process = subprocess.Popen(
            # -P: this script's folder is not the one to import from.
            [sys.executable, "-P", __file__, *sys.argv[1:], "--serve"],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit("error: the process of a checkout ended; what it said stands above.")
        return line

    def seconds(self, name: str, seed: int) -> float:
        """Those of a work."""
        assert self._process.stdin
        self._process.stdin.write(f"{name} {seed}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def compare(name: str, pairs: int, before: Checkout, after: Checkout) -> str:
    """A line of the table."""
    times: dict[Checkout, list[float]] = {before: [], after: []}
    for pair in range(-1, pairs):  # The first one warms up.
        for each in (before, after) if pair % 2 else (after, before):
            times[each].append(each.seconds(name, pair))
    old, new = times[before][1:], times[after][1:]
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = statistics.median(new) / statistics.median(old)
    return f"{name:8} {pairs:3} pairs  {middle:.2f} ({low:.2f}–{high:.2f})  {medians:.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, metavar="DIR")
    parser.add_argument("--after", type=Path, default=CHECKOUT, metavar="DIR")
    parser.add_argument("--model", choices=("demo", "wide"), default="demo")
    parser.add_argument("--layers", type=int, default=1, help="of the wide model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--new", type=int, default=64, help="tokens of a decoded answer")
    parser.add_argument("--requests", type=int, default=64, help="of the mixed work")
    parser.add_argument(
        "--pairs", type=int, default=20, help="at least 2; a fifth of them if mixed"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(WORKS))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.only) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}. Choose from {', '.join(WORKS)}.")
    if args.pairs < 2:
        parser.error(f"--pairs is {args.pairs}; 2 or more are needed for quartiles.")
    if args.serve:
        serve(args)
        return
    before, after = Checkout(args.before), Checkout(args.after)
    print("work      pairs      median ratio (quartiles)  ratio of medians")
    for name in args.only:
        pairs = max(2, args.pairs // 5) if name == "mixed" else args.pairs
        print(compare(name, pairs, before, after), flush=True)
    before.close()
    after.close()


if __name__ == "__main__":
    main()
