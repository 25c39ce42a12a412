"""The matrix product that every tower is made of.

Owns   one weight, as it is stored, and the product with it.
Takes  rows (…, in_features); gives rows (…, out_features).
Never  knows which tower it stands in. Weight formats and shards compose here, not in subclasses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Module):
    """`rows @ weight.T + bias`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        return functional.linear(rows, self.weight, self.bias)
