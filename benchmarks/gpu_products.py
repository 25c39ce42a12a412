"""The part of benchmarks/gpu.py that measures products with weights: products.

Owns   the shapes and the formats, and weights of random numbers in them.
Takes  a Setting. In a dry run the shapes are tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from gpu_results import Results, Setting, UnavailableError, as_graph, median_seconds
from torch import Tensor

from minigpt4_runtime.checkpoint.blank_model import dtype_of
from minigpt4_runtime.formats.contracts import InOrder, LinearKernel, WeightFormat
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import weight_format
from minigpt4_runtime.kernels.registry import linear_kernel

# Inputs and outputs of a 7B's layer: gate and up in one, queries, keys and values in one, the other
# product of attention, and that of the feed-forward.
SHAPES = ((4096, 22016), (4096, 12288), (4096, 4096), (11008, 4096))
FEW, MANY = (1, 8, 64), 2048
READ = ("float", "w8a16", "w4a16-g32", "w4a16-g128", "w8a8-fp8")
MULTIPLIED = (
    "float", "w8a8", "w8a8-g128", "w4a8-g128", "w8a16-sparse24", "w8a8-sparse24", "w8a8-fp8",
    "w4a16-g128",
)  # fmt: skip
# Several weights are read in turn, so that none is in a cache when it is read again.
READ_BYTES = 2**29
Multiply = Callable[[Tensor], Tensor]


def products(setting: Setting, results: Results) -> None:
    """For a few rows the weight's bytes a second, for many the operations."""
    shapes: Sequence[tuple[int, int]] = ((128, 64),) if setting.is_dry else SHAPES
    for shape, name in product(shapes, READ):
        for num_rows in FEW:
            measure = partial(read_rate, setting, name, shape, num_rows)
            results.attempt(show(name, shape, num_rows), measure)
    for shape in shapes:
        measure = partial(read_rate, setting, "float", shape, 1, kernel=DENSE.multiply)
        results.attempt(show("torch's float16", shape, 1), measure)
    # Of many rows two shapes will do.
    shapes = shapes[::2]
    for shape, name in product(shapes, MULTIPLIED):
        num_rows = 16 if setting.is_dry else MANY
        measure = partial(product_rate, setting, name, shape, num_rows)
        results.attempt(show(name, shape, num_rows), measure)
    for shape, name in product(shapes, OTHERS):
        num_rows = 16 if setting.is_dry else MANY
        measure = partial(other_rate, setting, OTHERS[name], shape, num_rows)
        results.attempt(show(name, shape, num_rows), measure)


def show(name: str, shape: tuple[int, int], num_rows: int) -> str:
    """As in "w8a16, 4096 × 11008, 8 rows"."""
    name = "float16" if name == "float" else name
    return f"{name}, {shape[0]} × {shape[1]}, {num_rows} {'row' if num_rows == 1 else 'rows'}"


def read_rate(
    setting: Setting,
    name: str,
    shape: tuple[int, int],
    num_rows: int,
    *,
    kernel: LinearKernel | None = None,
) -> dict[str, float]:
    """The bytes of the weight that are read a second, by the device's kernel or by another."""
    chosen = weight_format(name)
    num_bytes = sum(part.nbytes for part in random_parts(chosen, shape, setting).values())
    count = 2 if setting.is_dry else -(-READ_BYTES // num_bytes)
    seconds = seconds_each(setting, chosen, shape, num_rows, count, kernel=kernel)
    return {
        "rows": num_rows, "microseconds": seconds * 1e6,
        "gigabytes_per_second": num_bytes / seconds / 1e9,
    }  # fmt: skip


def product_rate(
    setting: Setting, name: str, shape: tuple[int, int], num_rows: int
) -> dict[str, float]:
    """The multiplications and additions a second."""
    seconds = seconds_each(setting, weight_format(name), shape, num_rows, 2)
    operations = 2 * num_rows * shape[0] * shape[1]
    return {
        "rows": num_rows, "microseconds": seconds * 1e6,
        "teraflops_per_second": operations / seconds / 1e12,
    }  # fmt: skip


def other_rate(
    setting: Setting, other: Callable[[Tensor], Multiply], shape: tuple[int, int], num_rows: int
) -> dict[str, float]:
    """The rate of a product that we have no kernel for, counted as if no weight were left out."""
    if setting.device.type != "cuda":
        raise UnavailableError("torch has this product on a GPU alone")
    sparse = weight_format("w8a16-sparse24")
    multiply = other(sparse.unpack(random_parts(sparse, shape, setting)).half())
    rows = torch.randn(num_rows, shape[0], device=setting.device).half()
    seconds = median_seconds(as_graph(lambda: multiply(rows), setting), setting.device)
    operations = 2 * num_rows * shape[0] * shape[1]
    return {
        "rows": num_rows, "microseconds": seconds * 1e6,
        "teraflops_per_second": operations / seconds / 1e12,
    }  # fmt: skip


def sparse_halves(weight: Tensor) -> Multiply:
    """By torch's semi-structured 2:4 weight in float16."""
    kept = torch.sparse.to_sparse_semi_structured(weight)
    return lambda rows: torch.nn.functional.linear(rows, kept)


def sparse_bytes(weight: Tensor) -> Multiply:
    """By the same in int8, after the rows are rounded; the sums are not scaled."""
    from minigpt4_runtime.kernels.rounding_triton import round_to_int8

    whole = (weight * (127 / weight.abs().max())).to(torch.int8)
    kept = torch.sparse.to_sparse_semi_structured(whole)
    return lambda rows: torch.mm(kept, round_to_int8(rows, None)[0].T)


# What weights of our 2:4 formats could be multiplied by, if it is faster.
OTHERS: dict[str, Callable[[Tensor], Multiply]] = {
    "torch's 2:4 float16": sparse_halves, "torch's 2:4 int8": sparse_bytes,
}  # fmt: skip


def seconds_each(
    setting: Setting,
    chosen: WeightFormat,
    shape: tuple[int, int],
    num_rows: int,
    count: int,
    *,
    kernel: LinearKernel | None = None,
) -> float:
    """The time of a product, of `count` with weights of their own one after the other."""
    dtype = torch.float32 if setting.is_dry else torch.float16
    rows = torch.randn(num_rows, shape[0], device=setting.device).to(dtype)
    works = [multiplier(chosen, shape, setting) for _ in range(count)]

    def multiply_all() -> None:
        for own, parts in works:
            (kernel or own)(rows, parts, None)

    return median_seconds(as_graph(multiply_all, setting), setting.device) / count


def multiplier(
    chosen: WeightFormat, shape: tuple[int, int], setting: Setting
) -> tuple[LinearKernel, dict[str, Tensor]]:
    """A format's kernel on the device, and a weight in the order that it wants."""
    parts = random_parts(chosen, shape, setting)
    kernel = linear_kernel(chosen, device=setting.device, widen_from=None)
    if isinstance(kernel, InOrder):
        parts, kernel = kernel.arrange(parts)
    return kernel, parts


def random_parts(chosen: WeightFormat, shape: Sequence[int], setting: Setting) -> dict[str, Tensor]:
    """The parts of a weight, of random numbers: to round one of floats would take longer."""
    floats = torch.float32 if setting.is_dry else torch.float16
    parts = {}
    for name, part in chosen.parts(shape[1], shape[0]).items():
        dtype = dtype_of(part, floats)
        if dtype.is_floating_point:
            parts[name] = torch.rand(part.shape, device=setting.device).to(dtype) / 100
        else:
            limits = torch.iinfo(dtype)
            parts[name] = torch.randint(
                limits.min, limits.max, part.shape, dtype=dtype, device=setting.device
            )
    return parts
