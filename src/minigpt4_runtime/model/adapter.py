"""What LoRA adds to a product (Hu et al., 2021): a change of low rank, kept beside the weight.

Owns   the two factors of one change, and the seam at which a `Linear` adds it.
Takes  rows (…, in_features); gives what is added to the product, (…, out_features).
Never  knows the weight or its format, so that it goes with any.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Addition(Protocol):
    """What a Linear adds to its product. One that picks an adapter for each row fits here too."""

    def __call__(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `rows`."""


class Adapter(nn.Module):
    """B·A·scale of one rank: `low` is A (rank, in_features), `high` is B (out_features, rank)."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.low = nn.Parameter(torch.empty(rank, in_features))
        self.high = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, rows: Tensor) -> Tensor:
        """See `Addition`."""
        return functional.linear(functional.linear(rows, self.low) * self.scale, self.high)
