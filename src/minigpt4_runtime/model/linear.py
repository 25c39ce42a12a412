"""The matrix product that every tower is made of.

Owns   one weight, as it is stored, and the product with it.
Takes  rows (…, in_features); gives rows (…, out_features).
Never  knows which tower it stands in. Weight formats and shards compose here, not in subclasses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Module):
    """`rows @ weight.T + bias`.

    `widen_from` is the number of rows from which on the weight is widened to float32 for the
    product, because this device is faster so; None is never. Rows wider than the weight always
    widen it.
    """

    widen_from: int | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `rows`."""
        if rows.dtype == self.weight.dtype and not self._widens(rows):
            return functional.linear(rows, self.weight, self.bias)
        bias = self.bias.float() if self.bias is not None else None
        return functional.linear(rows.float(), self.weight.float(), bias).to(rows.dtype)

    def _widens(self, rows: Tensor) -> bool:
        is_many = self.widen_from is not None and rows[..., 0].numel() >= self.widen_from
        return is_many and self.weight.dtype != torch.float32


def set_widen_from(module: nn.Module, num_rows: int | None) -> None:
    """Choose the route of every Linear in `module`."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.widen_from = num_rows
