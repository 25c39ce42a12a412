"""Products with weights that do not learn, through which gradients pass (QLoRA's way).

Owns   `frozen_kernel`, for every format of weights that does not round what it multiplies.
Takes  a format and its parts; gives the product, and on the way back the gradient of the rows.
Never  keeps a weight as floats: each is widened when it is multiplied by, both ways, and let go.

Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.formats.contracts import LinearKernel, WeightFormat
from minigpt4_runtime.formats.dense import DENSE


def frozen_kernel(weight_format: WeightFormat) -> LinearKernel:
    """The product with weights of that format: what autograd keeps of them are their own parts."""
    if weight_format is DENSE:
        return DENSE.multiply
    return partial(_multiply, weight_format)


def _multiply(
    weight_format: WeightFormat, rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    product: Tensor = _Product.apply(rows, weight_format, dict(parts))  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """rows (…, in) → (…, out). The matrix has the dtype of the rows while it is there."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight_format: WeightFormat, parts: dict[str, Tensor]
    ) -> Tensor:
        ctx.weight_format, ctx.parts = weight_format, parts
        return functional.linear(rows, weight_format.unpack(parts).to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight_format.unpack(ctx.parts).to(grad.dtype), None, None
