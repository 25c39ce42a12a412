"""The CPU kernels in C++: a distribution of its own, which may be absent.

Owns   whether it is there, what is lost without it, and the products that it computes.
Takes  rows and the parts of a weight; gives rows.
Never  copies a weight of floats or 8 bits: its bytes are read as they lie in the mapped file.
       One of 4 bits is put in order when it is loaded: a vector has numbers of several outputs.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.formats.contracts import InOrder, LinearKernel
from minigpt4_runtime.formats.integer import unpack_words

# Not `pip install ./kernels` alone: pip would download another torch to build with.
INSTALL = "make demo, or the commands in kernels/README.md (in a checkout)"
_MODULE = "minigpt4_kernels"
_INTERFACE = 5
_ORDERED_OUTPUTS = 16


@cache
def find() -> tuple[ModuleType | None, str]:
    """The package that holds the kernels, or None and a sentence that says what is lost."""
    try:
        module = importlib.import_module(_MODULE)
        if getattr(module, "INTERFACE", 1) == _INTERFACE:
            return module, ""
        reason = "are of another version than this package and are not used"
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        reason = "are not installed"
    except OSError as error:
        reason = f"cannot be loaded by torch {torch.__version__} ({error})"
    return None, (
        f"The CPU kernels {reason}: quantised weights are multiplied by plain torch, many times "
        f"more slowly, and a few rows of floats several times. Run: {INSTALL}"
    )


def require() -> ModuleType:
    """The package that holds the kernels.

    Raises:
        BackendUnavailableError: it is not installed, or not for this torch.
    """
    module, lost = find()
    if module is None:
        raise BackendUnavailableError(lost)
    return module


def level() -> str | None:
    """The instructions that the kernels use (kernels/README.md); None without the kernels."""
    module, _ = find()
    return module.level() if module else None


@cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning(find()[1])


def _product(operator_name: str, part_names: tuple[str, ...], *options: int) -> LinearKernel:
    """The product by an operator, which takes these parts in order, None for one that is not there.

    Behind rows, parts and bias it takes the options.
    """
    operator = getattr(torch.ops.minigpt4_kernels, operator_name).default

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        product: Tensor = operator(flat, *map(parts.get, part_names), bias, *options)
        return product.view(*rows.shape[:-1], product.shape[-1])

    return multiply


def float_product() -> LinearKernel | None:
    """The product with a weight of floats, summed in float32; None without the kernels."""
    return _product("linear_float", ("weight",)) if find()[0] else None


def _prepare(
    operator_name: str,
    part_names: tuple[str, ...],
    rounds_rows: bool,
    widen_from: int | None,  # noqa: ARG001
) -> LinearKernel | None:
    """The product with integers; None without the kernels.

    `rounds_rows` rounds the rows to 8 bits; without it they keep 16.
    """
    if find()[0]:
        return _product(operator_name, part_names, rounds_rows)
    _warn_once()
    return None


def _prepare_int4(rounds_rows: bool, widen_from: int | None) -> InOrder | None:  # noqa: ARG001
    if find()[0]:
        return InOrder(partial(_arrange_int4, rounds_rows))
    _warn_once()
    return None


def _arrange_int4(
    rounds_rows: bool, parts: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], LinearKernel]:
    """Words, scales and zero points of 16 outputs side by side: see kernels/source/product.hpp."""
    outputs = len(parts["weight_packed"])
    arranged = {name: _side_by_side(parts[name]) for name in _INT4[:2]}
    if (packed := parts.get("weight_zero_point")) is not None:
        numbers = unpack_words(packed.T).T + 8  # As they are stored, from 0 to 15.
        arranged["weight_zero_point"] = _side_by_side(numbers.half())
    return arranged, _product("linear_int4", _INT4, outputs, rounds_rows)


def _side_by_side(tensor: Tensor) -> Tensor:
    """(outputs, C) → (blocks, C, 16), zeros filling up the last block."""
    padded = functional.pad(tensor, (0, 0, 0, -len(tensor) % _ORDERED_OUTPUTS))
    blocks = padded.view(-1, _ORDERED_OUTPUTS, tensor.shape[1])
    return blocks.transpose(1, 2).contiguous()


_INT8 = ("weight", "weight_scale", "weight_zero_point")
_INT4 = ("weight_packed", "weight_scale", "weight_zero_point")
_SPARSE24 = ("weight_values", "weight_positions", "weight_scale")
# For the rows of LINEAR_KERNELS: the family of formats is in the name.
prepare_w8a16 = partial(_prepare, "linear_int8", _INT8, False)
prepare_w8a8 = partial(_prepare, "linear_int8", _INT8, True)
prepare_w4a16 = partial(_prepare_int4, False)
prepare_w4a8 = partial(_prepare_int4, True)
prepare_w8a16_sparse24 = partial(_prepare, "linear_sparse24_int8", _SPARSE24, False)
prepare_w8a8_sparse24 = partial(_prepare, "linear_sparse24_int8", _SPARSE24, True)
