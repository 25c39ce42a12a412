"""The matrix product that every tower is made of.

Owns   one weight, as it is stored, and the product with it.
Takes  rows (…, in_features); gives rows (…, out_features).
Never  knows which tower it stands in. Weight formats and shards compose here, not in subclasses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Torch's half-precision product is slow on a CPU from a few rows on; widening the weight first
# is three times faster there (docs/log.md has the measurement).
WIDEN_FROM_ROWS = 16


class Linear(nn.Module):
    """`rows @ weight.T + bias`, with the weight kept in the dtype it was loaded in."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `rows`."""
        if self.weight.dtype == rows.dtype and not self._widens(rows):
            return functional.linear(rows, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(rows.float(), self.weight.float(), bias).to(rows.dtype)

    def _widens(self, rows: Tensor) -> bool:
        half = rows.dtype in (torch.float16, torch.bfloat16)
        return half and rows.is_cpu and rows.numel() // rows.shape[-1] >= WIDEN_FROM_ROWS
