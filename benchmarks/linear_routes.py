"""From how many rows on is it worth widening a half-precision weight before a CPU product?

Prints, for each dtype and number of rows, the time of the direct product and of the widened one
as multiples of the float32 product in the same run. The answer differs between CPUs: see docs/log.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work` after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Measure both routes over a range of row counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wide = torch.randn(args.width, args.width)
    print(f"{args.width}×{args.width}, {args.threads} threads; multiples of the float32 product")
    print(f"{'dtype':>9} {'rows':>5} {'direct':>8} {'widened':>8}")
    for dtype in (torch.bfloat16, torch.float16):
        weight = wide.to(dtype)
        for rows in (1, 2, 4, 8, 16, 32, 64, 256):
            inputs = torch.randn(rows, args.width)
            half = inputs.to(dtype)
            reference = seconds(lambda: functional.linear(inputs, wide), args.repeats)
            direct = seconds(lambda: functional.linear(half, weight), args.repeats)
            widened = seconds(lambda: functional.linear(half.float(), weight.float()), args.repeats)
            name = str(dtype).removeprefix("torch.")
            print(f"{name:>9} {rows:>5} {direct / reference:>8.2f} {widened / reference:>8.2f}")


if __name__ == "__main__":
    main()
