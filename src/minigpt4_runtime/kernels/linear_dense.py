"""Products with a matrix of floats, on devices where half-precision products are slow.

Owns   the route, chosen by the number of rows. Takes rows and a weight; gives rows.
"""

from collections.abc import Mapping

from torch import Tensor

from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.dense import DENSE


def prepare(widen_from: int | None) -> LinearKernel:
    """The product that widens the weight to float32 for `widen_from` rows and more."""
    if widen_from is None:
        return DENSE.multiply

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if rows[..., 0].numel() < widen_from:
            return DENSE.multiply(rows, parts, bias)
        return DENSE.multiply_wide(rows, parts["weight"], bias)

    return multiply
