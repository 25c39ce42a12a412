"""The CPU kernels' products alone, beside torch's, oneDNN's and MKL's, in one run.

Prints for each kind of weight and number of rows: the bytes of the weight read a second, as a share
of the best that a plain read reaches here, and the speed as a multiple of torch's float32 product
of the same shape. Weights are larger than the caches. Rounds go over all cases in turn, and each
case has its best round, so that what else the machine does for a while falls on all of them. Where
other programs run too, --processor-time with one thread leaves out the time of the others.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import minigpt4_kernels
import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.kernels.linear_dense import multiply_by_onednn

GROUP = 128


def multiply(operator: str, *arguments: Tensor | int | None) -> Tensor:
    """The product that one of the kernels' operators gives."""
    product: Tensor = getattr(torch.ops.minigpt4_kernels, operator)(*arguments)
    return product


@dataclass
class Case:
    """One product, the bytes that it reads, and the seconds of its best round."""

    name: str
    rows: int
    weight_bytes: int
    work: Callable[[], Tensor]
    seconds: float = float("inf")

    def run(self, clock: Callable[[], float]) -> None:
        """Time it once."""
        started = clock()
        self.work()
        self.seconds = min(self.seconds, clock() - started)


def quantised(outputs: int, inputs: int, rows: list[int]) -> list[Case]:
    """Products with 8-bit, 4-bit and 2:4 weights of this shape, with and without rounded rows."""
    int8 = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    int4 = int8[:, : inputs // 2].contiguous().view(torch.int32).view(-1, inputs // 8, 16)
    values = int8[:, : inputs // 2].contiguous()
    positions = torch.full((outputs, inputs // 8), 0x44, dtype=torch.uint8)
    scale = torch.rand(outputs, 1)
    scales = torch.rand(outputs // 16, inputs // GROUP, 16).half()
    cases = []
    for count in rows:
        x = torch.randn(count, inputs)
        for activations, rounds in (("a8", True), ("a16", False)):

            def by_int8(x: Tensor = x, rounds: bool = rounds) -> Tensor:
                return multiply("linear_int8", x, int8, scale, None, None, rounds)

            def by_int4(x: Tensor = x, rounds: bool = rounds) -> Tensor:
                return multiply("linear_int4", x, int4, scales, None, None, outputs, rounds)

            def by_sparse(x: Tensor = x, rounds: bool = rounds) -> Tensor:
                return multiply("linear_sparse24_int8", x, values, positions, scale, None, rounds)

            cases += [
                Case(f"w8{activations}", count, int8.nbytes, by_int8),
                Case(f"w4{activations}-g{GROUP}", count, int4.nbytes + scales.nbytes, by_int4),
                Case(f"2:4 w8{activations}", count, values.nbytes + positions.nbytes, by_sparse),
            ]
    return cases


def packed(name: str, x: Tensor, weight: Tensor) -> Case:
    """The product with a copy of the weight that oneDNN or MKL has put in an order of its own."""
    if name == "oneDNN packed":
        copy = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))  # noqa: SLF001
        return Case(name, len(x), weight.nbytes, lambda: multiply_by_onednn(x, copy, None))
    copy = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x))  # noqa: SLF001
    linear = torch.ops.mkl._mkl_linear  # noqa: SLF001
    return Case(name, len(x), weight.nbytes, lambda: linear(x, copy, weight, None, len(x)))


def floats(outputs: int, inputs: int, rows: list[int]) -> list[Case]:
    """Products with float weights of this shape, ours and torch's."""
    wide = torch.randn(outputs, inputs)
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = wide.to(dtype)
        name = str(dtype).removeprefix("torch.")
        for count in rows:
            x = torch.randn(count, inputs)

            def ours(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                return multiply("linear_float", x, weight, None)

            cases.append(Case(name, count, weight.nbytes, ours))
            if dtype == torch.float32:

                def by_torch(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                    return functional.linear(x, weight)

                def by_onednn(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                    return multiply_by_onednn(x, weight, None)

                cases.append(Case("torch float32", count, weight.nbytes, by_torch))
                cases.append(Case("oneDNN float32", count, weight.nbytes, by_onednn))
                cases += [packed(name, x, weight) for name in ("oneDNN packed", "MKL packed")]
            else:

                def by_torchs_halves(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                    return functional.linear(x.to(weight.dtype), weight)

                def widened(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                    return functional.linear(x, weight.float())

                cases.append(Case(f"torch {name}", count, weight.nbytes, by_torchs_halves))
                cases.append(Case(f"{name} widened", count, weight.nbytes, widened))
    return cases


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=11008, help="a multiple of 16")
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--floats-alone", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (args.outputs, args.inputs, args.rows)
    buffer = torch.ones(args.outputs * args.inputs)
    ones = torch.ones(args.inputs)
    reads = [
        Case("sum", 1, buffer.nbytes, buffer.sum),
        Case("vector", 1, buffer.nbytes, lambda: torch.mv(buffer.view(-1, args.inputs), ones)),
    ]
    cases = [*reads, *([] if args.floats_alone else quantised(*size)), *floats(*size)]
    for case in cases * (args.rounds + 1):
        case.run(time.thread_time if args.processor_time else time.perf_counter)
    few = [case for case in cases if case.rows == 1]
    best = max(case.weight_bytes / case.seconds for case in few)
    by_torch = {case.rows: case.seconds for case in cases if case.name == "torch float32"}
    print(
        f"{args.outputs}×{args.inputs}, {args.threads} threads, level {minigpt4_kernels.level()}; "
        "best read: the fastest of all one-row products and sums"
    )
    print(f"{'weight':>16} {'rows':>5} {'of best read':>13} {'× torch float32':>16}")
    for case in cases[len(reads) :]:
        share = case.weight_bytes / case.seconds / best
        ratio = by_torch[case.rows] / case.seconds
        print(f"{case.name:>16} {case.rows:>5} {share:>13.0%} {ratio:>16.2f}")


if __name__ == "__main__":
    main()
