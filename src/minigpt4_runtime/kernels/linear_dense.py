"""Products with a matrix of floats on a CPU, where torch is slow with few rows and with halves.

Owns   the route, chosen by the number of rows, the weight's size and what the CPU can do.
Takes  rows and a weight; gives rows.
"""

import sys
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.kernels import native

# Up to so many rows the CPU kernels are faster than torch (benchmarks/quantised_kernels.py), if the
# weight has so many numbers: a call costs more than torch's own.
FEW_ROWS = 32
LEAST_NUMBERS = 2**18
# With these instructions they are so for any number of rows, by halves and where torch is slow.
LEVELS_FOR_MANY_ROWS = ("avx2", "avxvnni")


def prepare(widen_from: int | None) -> LinearKernel:
    """The product by the CPU kernels where they are faster, if they are installed, else by torch.

    For `widen_from` rows and more torch gets the weight widened to float32. Where torch is slow in
    float32, its oneDNN multiplies.
    """
    ours, is_slow = native.float_product(), torch_is_slow_in_float32()
    if ours is None and widen_from is None and not is_slow:
        return DENSE.multiply
    wide_rows = widen_from or sys.maxsize
    most_halves = sys.maxsize if native.level() in LEVELS_FOR_MANY_ROWS else FEW_ROWS
    most_floats = most_halves if is_slow else FEW_ROWS

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        weight, num_rows = parts["weight"], rows.numel() // rows.shape[-1]
        is_large = weight.numel() >= LEAST_NUMBERS
        most_rows = most_floats if weight.dtype == torch.float32 else most_halves
        if ours and is_large and num_rows <= most_rows:
            return ours(rows, parts, bias)
        if num_rows < wide_rows and rows.dtype == weight.dtype != torch.float32:
            return DENSE.multiply(rows, parts, bias)
        if is_slow and is_large:
            return multiply_by_onednn(rows, weight, bias)
        return DENSE.multiply_wide(rows, weight, bias)

    return multiply


@cache
def torch_is_slow_in_float32() -> bool:
    """Whether torch's own float32 product leaves half of this CPU unused.

    It is MKL's, which on AMD's processors uses AVX2 at most. oneDNN, which torch has as well, uses
    AVX-512 (benchmarks/quantised_kernels.py).
    """
    # Older versions of torch do not tell.
    facts: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and "AMD" in str(facts.get("cpu_name"))


def multiply_by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(…, in) → (…, out) in float32, whatever the dtypes are."""
    bias = bias.float() if bias is not None else None
    flat = rows.float().reshape(-1, rows.shape[-1])
    linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - torch's compiler calls it too.
    product: Tensor = linear(flat, weight.float(), bias, "none", [], "")
    return product.view(*rows.shape[:-1], -1).to(rows.dtype)
