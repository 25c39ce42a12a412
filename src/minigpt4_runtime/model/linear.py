"""The matrix product that every tower is made of.

Owns   one weight, in the tensors of its format, and the kernel that multiplies by it.
Takes  rows (…, in_features); gives rows (…, out_features).
Never  knows its tower. Weight formats and shards compose here, not in subclasses.
"""

import torch
from torch import Tensor, nn

from minigpt4_runtime.formats.contracts import LinearKernel, WeightFormat
from minigpt4_runtime.formats.dense import DENSE


class Linear(nn.Module):
    """`rows @ weight.T + bias`. It is a matrix of floats until `use` says otherwise."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.weight_format: WeightFormat = DENSE
        self.part_names: tuple[str, ...] = ("weight",)
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._multiply: LinearKernel = DENSE.multiply

    def use(self, weight_format: WeightFormat, kernel: LinearKernel) -> None:
        """Hold the weight in a format, and multiply with `kernel`. In a new format it is empty."""
        self._multiply = kernel
        if weight_format is self.weight_format:
            return
        for name in self.part_names:
            delattr(self, name)
        parts = weight_format.parts(*self.shape)
        for name, part in parts.items():
            dtype = getattr(torch, part.dtype) if part.dtype else None
            tensor = torch.empty(part.shape, dtype=dtype)
            setattr(self, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        self.weight_format, self.part_names = weight_format, tuple(parts)

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `rows`."""
        return self._multiply(rows, self._parameters, self.bias)  # type: ignore[arg-type]
