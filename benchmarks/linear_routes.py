"""The number of rows from which widening a half-precision weight makes a CPU product faster.

Prints, for each dtype and number of rows, the time of the direct and of the widened product as
multiples of the float32 product in the same run. Results differ between CPUs: see docs/log.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
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


def product_seconds(inputs: Tensor, weight: Tensor, repeats: int, *, widen: bool = False) -> float:
    """Time of one product, optionally with both sides widened first."""
    if widen:
        return seconds(lambda: functional.linear(inputs.float(), weight.float()), repeats)
    return seconds(lambda: functional.linear(inputs, weight), repeats)


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
            reference = product_seconds(inputs, wide, args.repeats)
            direct = product_seconds(inputs.to(dtype), weight, args.repeats)
            widened = product_seconds(inputs.to(dtype), weight, args.repeats, widen=True)
            name = str(dtype).removeprefix("torch.")
            print(f"{name:>9} {rows:>5} {direct / reference:>8.2f} {widened / reference:>8.2f}")


if __name__ == "__main__":
    main()
