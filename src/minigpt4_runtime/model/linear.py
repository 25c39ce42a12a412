"""The matrix product that every tower is made of.

Owns   one weight, in the tensors of its format, and the kernel that multiplies by it; and what is
       added to the product, if anything. And `Joint`: several weights for the same rows.
Takes  rows (…, in_features); gives rows (…, out_features).
Never  knows its tower. Weight formats and shards compose here, not in subclasses.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minigpt4_runtime.formats.contracts import InOrder, LinearKernel, WeightFormat
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.model.adapter import Adapter, AdapterChoice, Addition


class Linear(nn.Module):
    """`rows @ weight.T + bias`. It is a matrix of floats until `use` says otherwise."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.weight_format: WeightFormat = DENSE
        self.part_names: tuple[str, ...] = ("weight",)
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: Addition | None = None
        self.choice: AdapterChoice | None = None
        self.wanted_order: InOrder | None = None
        self.multiply: LinearKernel = DENSE.multiply

    def use(self, weight_format: WeightFormat, kernel: LinearKernel | InOrder) -> None:
        """Hold the weight in a format, and multiply with `kernel`. In a new format it is empty.

        A kernel that wants another order multiplies once `settle` was called.
        """
        self.wanted_order = kernel if isinstance(kernel, InOrder) else None
        self.multiply = weight_format.multiply if isinstance(kernel, InOrder) else kernel
        if weight_format is self.weight_format:
            return
        parts = weight_format.parts(*self.shape)
        dtypes = [getattr(torch, part.dtype) if part.dtype else None for part in parts.values()]
        empty = [torch.empty(p.shape, dtype=d) for p, d in zip(parts.values(), dtypes, strict=True)]
        self._hold(dict(zip(parts, empty, strict=True)))
        self.weight_format = weight_format

    def adapt(self, rank: int, alpha: float) -> None:
        """Add LoRA's change to each product: `adapter`, whose factors are empty."""
        out_features, in_features = self.shape
        self.adapter = Adapter(in_features, out_features, rank=rank, scale=alpha / rank)

    def _hold(self, parts: dict[str, Tensor]) -> None:
        for name in self.part_names:
            delattr(self, name)
        for name, tensor in parts.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        self.part_names = tuple(parts)

    def settle(self, parts: Mapping[str, Tensor]) -> None:
        """Hold loaded parts in the order that the kernel wants, for good.

        They are then no longer those of the format.
        """
        if self.wanted_order is not None:
            arranged, self.multiply = self.wanted_order.arrange(parts)
            self._hold(arranged)
            self.requires_grad_(False)
            self.wanted_order = None

    @contextmanager
    def multiplying_by(self, matrix: Tensor) -> Iterator[None]:
        """For a while, take this matrix of floats for the weight. What is held stays."""
        held = self.multiply
        self.multiply = lambda rows, _, bias: DENSE.multiply(rows, {"weight": matrix}, bias)
        try:
            yield
        finally:
            self.multiply = held

    def forward(self, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `rows`.

        `chosen` are the numbers of the adapters that rows (T, in_features) have chosen.
        """
        product = self.multiply(rows, self._parameters, self.bias)  # type: ignore[arg-type]
        return self.complete(product, rows, chosen)

    def complete(self, product: Tensor, rows: Tensor, chosen: Tensor | None) -> Tensor:
        """The product with the weight, and what is added to it for these rows."""
        if self.adapter is not None:
            product = product + self.adapter(rows)
        if chosen is None or self.choice is None:
            return product
        return product + self.choice(rows, chosen)


class Joint(nn.Module):
    """Linears that multiply the same rows: one product, once their weights lie in one.

    An accelerator then has one product to start, and reads a longer weight at a time. They stay
    modules of their own, whose parts are views; this one has no weights that it could name.
    """

    def __init__(self, *linears: Linear) -> None:
        super().__init__()
        self.linears = linears
        self._whole: Mapping[str, Tensor] | None = None
        self._bias: Tensor | None = None

    @property
    def is_possible(self) -> bool:
        """Whether one kernel multiplies by all, and their parts can lie one behind the other."""
        first = self.linears[0]
        parts = first.weight_format.parts(*first.shape).values()
        return all(part.split[0] == 0 for part in parts) and all(
            each.weight_format is first.weight_format
            and each.wanted_order is None
            and (each.bias is None) == (first.bias is None)
            for each in self.linears
        )

    def hold(self, whole: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Multiply by these parts, which the Linears' own lie in, one behind the other."""
        self._whole, self._bias = whole, bias

    def forward(self, rows: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, ...]:
        """(…, in_features) → (…, out_features) of each. See `Linear.forward`."""
        if self._whole is None:
            return tuple(linear(rows, chosen) for linear in self.linears)
        together = self.linears[0].multiply(rows, self._whole, self._bias)
        products = torch.split(together, [linear.shape[0] for linear in self.linears], dim=-1)
        return tuple(
            linear.complete(product, rows, chosen)
            for linear, product in zip(self.linears, products, strict=True)
        )


def settle(module: nn.Module) -> None:
    """Settle the loaded parts of each Linear of a module."""
    for each in module.modules():
        if isinstance(each, Linear):
            each.settle({name: each.get_parameter(name).detach() for name in each.part_names})
