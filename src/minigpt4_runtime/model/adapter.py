"""What LoRA adds to a product (Hu et al., 2021): a change of low rank, kept beside the weight.

Owns   the two factors of one change, or of several that rows choose from, and the seams at which
       a `Linear` adds them.
Takes  rows (…, in_features); gives what is added to the product, (…, out_features).
Never  knows the weight or its format, so that it goes with any.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Addition(Protocol):
    """What a Linear adds to its product, to all rows alike. `AdapterChoice` is for each row."""

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


class Factors(NamedTuple):
    """One change: A (rank, in_features), B (out_features, rank), and what it counts."""

    low: Tensor
    high: Tensor
    scale: float


class AdapterChoice:
    """Several changes to one weight, of which each row gets its own, or none.

    All A are one matrix, and all B are one: a row is multiplied by both whole, and what belongs to
    the A of others is 0 in between. So the work is the same for any choice of rows, no row moves,
    and a step is one chain of operations on tensors at fixed addresses. It is what S-LoRA and
    Punica gather for (Sheng et al., 2023; Chen et al., 2023), for a handful of adapters.
    """

    def __init__(self, factors: Mapping[int, Factors]) -> None:
        """By the number by which a row names its change."""
        each = factors.values()
        device = next(iter(each)).low.device
        ranks = torch.tensor([len(one.low) for one in each])

        def of_columns(numbers: Tensor) -> Tensor:
            return numbers.repeat_interleave(ranks).to(device)

        self.low = torch.cat([one.low for one in each])  # (R, in_features)
        self.high = torch.cat([one.high for one in each], 1)  # (out_features, R)
        self.owner = of_columns(torch.tensor(list(factors)))  # (R,)
        self.scale = of_columns(torch.tensor([one.scale for one in each])).to(self.low.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors."""
        return self.low.nbytes + self.high.nbytes

    def __call__(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """(T, in_features), and the number that each row has chosen (T,) → (T, out_features)."""
        scaled = functional.linear(rows, self.low) * self.scale
        own = torch.where(self.owner == chosen[:, None], scaled, 0)
        return functional.linear(own, self.high)
