"""What towers do to rows between their products, which a device may do in one go.

Owns   the contract, and the same in plain torch, which defines correct; the norm of both towers of
       the image side; and what lies between two layers.
Takes  rows; gives rows.
"""

from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class RowOperations(Protocol):
    """The operations of one kind of device."""

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(T, C) rows → the sum, if any are added, and its norm. `added` may be overwritten.

        That is: rows at unit root mean square, found in float32, times the weight (C,).
        """

    def add_and_layer_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The same with the norm of Ba et al., 2016: of mean 0 and variance 1, times weight + bias.

        Of rows (…, C). `added` may be overwritten.
        """

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both of which may be views of one product. `gate` may be overwritten."""


class TorchOperations:
    """See `RowOperations`."""

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        if added is not None:
            hidden = hidden + added
        rows = hidden.float()
        if not rows.is_cpu:
            normed = functional.rms_norm(rows, weight.shape, eps=eps)
            return hidden, weight * normed.to(hidden.dtype)
        # There, torch's own rms_norm is seven operations, and this five.
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        mean_square = torch.addcmul(_as_tensor(eps), length, length, value=1 / rows.shape[-1])
        return hidden, (rows * mean_square.rsqrt_()).to(hidden.dtype).mul_(weight)

    def add_and_layer_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        total = hidden if added is None else hidden + added
        return total, functional.layer_norm(total, weight.shape, weight, bias, eps)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `RowOperations`."""
        return functional.silu(gate) * up


@cache
def _as_tensor(number: float) -> Tensor:
    with torch.inference_mode(False):  # Kept for gradients too.
        return torch.tensor([number], device="cpu")


TORCH_OPERATIONS = TorchOperations()


class UsesOperations(nn.Module):
    """A module that computes by operations of its device."""

    operations: RowOperations = TORCH_OPERATIONS


def use_operations(module: nn.Module, operations: RowOperations) -> None:
    """Compute what lies between a model's products with these operations."""
    for each in module.modules():
        if isinstance(each, UsesOperations):
            each.operations = operations


class LayerNorm(UsesOperations):
    """The norm of a sum: see `RowOperations.add_and_layer_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """(…, C) rows → their sum, if any are added, and its norm. `added` may be overwritten."""
        return self.operations.add_and_layer_norm(hidden, added, self.weight, self.bias, self.eps)


class Residual(NamedTuple):
    """Rows between two layers, and what the last one adds: the next norm sums them up."""

    hidden: Tensor
    added: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum."""
        return self.hidden if self.added is None else self.hidden + self.added
