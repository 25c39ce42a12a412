"""What lies between the products of a language model, by the kernels in C++; the rest by torch.

Owns   nothing. Takes rows; gives rows.
"""

import torch
from torch import Tensor

from minigpt4_runtime.kernels import native
from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS, RowOperations, TorchOperations


class NativeOperations(TorchOperations):
    """See `RowOperations`. Each is one call, where torch has several."""

    def __init__(self) -> None:
        native.require()
        self._add_and_norm = torch.ops.minigpt4_kernels.add_rms_norm_.default
        self._gate = torch.ops.minigpt4_kernels.gate_.default

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        normed = self._add_and_norm(hidden, added, weight, eps)
        return (hidden if added is None else added), normed

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `RowOperations`."""
        return self._gate(gate.contiguous(), up.contiguous())  # type: ignore[no-any-return]


def prepare() -> RowOperations:
    """The kernels' operations if they are installed, else torch's."""
    return NativeOperations() if native.find()[0] else TORCH_OPERATIONS
