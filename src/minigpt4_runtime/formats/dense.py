"""A weight as it was trained: one matrix of floats. Folders call this format "float".

Owns   the product with it, widened to float32 where the rows are wider than the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minigpt4_runtime.formats.contracts import Part

if TYPE_CHECKING:
    from torch import Tensor


class Dense:
    """See `WeightFormat`."""

    name = family = "float"
    numbers_per_item: Mapping[str, int] = {}

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The weight itself."""
        return {"weight": Part((out_features, in_features))}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself."""
        return {"weight": weight}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight itself."""
        return parts["weight"]

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out), in the weight's dtype if the rows are of it, else in float32."""
        import torch  # Faster than `from torch.nn import …`, which counts in every call.

        if rows.dtype == parts["weight"].dtype:
            return torch.nn.functional.linear(rows, parts["weight"], bias)
        return self.multiply_wide(rows, parts["weight"], bias)

    def multiply_wide(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same in float32, whatever the dtypes are."""
        import torch

        bias = bias.float() if bias is not None else None
        return torch.nn.functional.linear(rows.float(), weight.float(), bias).to(rows.dtype)


DENSE = Dense()
