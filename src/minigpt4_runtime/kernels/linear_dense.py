"""Products with a matrix of floats on a CPU, where torch is slow with few rows and with halves.

Owns   the route, chosen by the number of rows and the weight's size.
Takes  rows and a weight; gives rows.
"""

import sys
from collections.abc import Mapping

from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.kernels import native

# Up to so many rows the CPU kernels are faster than torch (benchmarks/quantised_kernels.py), if the
# weight has so many numbers: a call costs more than torch's own.
FEW_ROWS = 32
LEAST_NUMBERS = 2**18


def prepare(widen_from: int | None) -> LinearKernel:
    """The product by the CPU kernels for few rows, if they are installed, else by torch.

    For `widen_from` rows and more torch gets the weight widened to float32.
    """
    few = native.float_product()
    if few is None and widen_from is None:
        return DENSE.multiply
    wide_rows = widen_from or sys.maxsize

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        num_rows = rows.numel() // rows.shape[-1]
        if few and num_rows <= FEW_ROWS and parts["weight"].numel() >= LEAST_NUMBERS:
            return few(rows, parts, bias)
        if num_rows < wide_rows:
            return DENSE.multiply(rows, parts, bias)
        return DENSE.multiply_wide(rows, parts["weight"], bias)

    return multiply
