"""What a language model does to rows between its products, which a device may do in one go.

Owns   the contract, and the same in plain torch, which defines correct.
Takes  rows; gives rows.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class RowOperations(Protocol):
    """The operations of one kind of device."""

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(T, C) rows → the sum, if any are added, and its norm. `added` may be overwritten.

        That is: rows at unit root mean square, found in float32, times the weight (C,).
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

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `RowOperations`."""
        return functional.silu(gate) * up


@cache
def _as_tensor(number: float) -> Tensor:
    with torch.inference_mode(False):  # Kept for gradients too.
        return torch.tensor([number], device="cpu")


TORCH_OPERATIONS = TorchOperations()
