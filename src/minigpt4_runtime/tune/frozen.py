"""Products with weights that do not learn, through which gradients pass.

Owns   `frozen_kernel`, for every format of weights that does not round what it multiplies, and
       `divided_kernel`, for weights of which each process holds a part.
Takes  a format and its parts; gives the product, and on the way back the gradient of the rows.
Never  keeps a weight as floats that is packed, nor whole that is divided: it is made when it is
       multiplied by, both ways, and let go.

Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". Rajbhandari et al., 2020,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.formats.contracts import InOrder, LinearKernel, WeightFormat
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.model.parallel import Group, share

# A part begins at such a multiple of bytes, so that it can be seen as numbers of any size.
_ALIGNMENT = 16
_HELD = "held"


def frozen_kernel(weight_format: WeightFormat) -> LinearKernel:
    """The product with weights of that format: what autograd keeps of them are their own parts."""
    if weight_format is DENSE:
        return DENSE.multiply
    return partial(_multiply, weight_format)


def divided_kernel(group: Group, weight_format: WeightFormat) -> InOrder:
    """The same, of weights whose bytes are divided evenly over the processes of a group.

    All of them must multiply by the same weights in the same order, forward and back.
    """
    return InOrder(partial(_divide, group, weight_format))


def _multiply(
    weight_format: WeightFormat, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    return _product(rows, partial(weight_format.unpack, dict(parts)), bias)


def _divide(
    group: Group, weight_format: WeightFormat, parts: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], LinearKernel]:
    """This process's share of the bytes of all parts in a row: the one part that it holds."""
    places, pieces, first = {}, [], 0
    for name, part in parts.items():
        piece = part.contiguous().flatten().view(torch.uint8)
        places[name] = _Place(first, first + len(piece), part.shape, part.dtype)
        pieces.append(functional.pad(piece, (0, -len(piece) % _ALIGNMENT)))
        first += len(pieces[-1])
    whole = functional.pad(torch.cat(pieces), (0, -first % group.size))
    own = share(len(whole), group)
    held = whole[own.start : own.stop].clone()
    return {_HELD: held}, _Divided(group, weight_format, places).multiply


class _Place(NamedTuple):
    """Where a part's bytes lie among those that all processes hold, and what they are."""

    first: int
    stop: int
    shape: torch.Size
    dtype: torch.dtype


class _Divided(NamedTuple):
    """A weight of which each process of a group holds a share."""

    group: Group
    weight_format: WeightFormat
    places: Mapping[str, _Place]

    def multiply(self, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """See `LinearKernel`."""
        return _product(rows, partial(self._join, parts[_HELD]), bias)

    def _join(self, held: Tensor) -> Tensor:
        whole = self.group.join(held)
        return self.weight_format.unpack({
            name: whole[at.first : at.stop].view(at.dtype).view(at.shape)
            for name, at in self.places.items()
        })  # fmt: skip


def _product(rows: Tensor, make: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    product: Tensor = _Product.apply(rows, make)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """rows (…, in) → (…, out). The matrix that `make` gives is there twice, and never between."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return functional.linear(rows, make().to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.make().to(grad.dtype), None
