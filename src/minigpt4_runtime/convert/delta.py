"""A language model that was published as what must be added to another one: a delta.

Owns   how a delta is known, and its sum with a base, weight by weight.
Takes  inventories; gives an inventory whose places add when they are read.
Never  has more of the base in memory than the weight that is read.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import list_some, show_shape
from minigpt4_runtime.convert.inventory import Inventory, Place, Reader
from minigpt4_runtime.convert.key_map import UNUSED_LANGUAGE, matches
from minigpt4_runtime.errors import CheckpointError

_NORMS = (r"model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight",)
# The mean size of the largest norm. A Llama's is above 1; a fine-tune moves it by hundredths.
_LARGEST_OF_DELTA = 0.1
# A tokenizer that was extended has more rows in the delta than in the base.
_WORD_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def refuse_delta(language: Inventory) -> None:
    """Refuse weights that are a delta.

    Raises:
        CheckpointError: they are one.
    """
    size = _measure_norms(language)
    if size is not None and size < _LARGEST_OF_DELTA:
        raise CheckpointError(
            f"{language.path} holds delta weights, the difference between a model and the LLaMA "
            f"that it was trained from: its norms are near 0 (at most {size:.2g} in the mean; a "
            "model's are near 1). Add that LLaMA with `minigpt4 convert --base DIR`."
        )


def add_base(delta: Inventory, base: Inventory) -> Inventory:
    """The sum of both, to be made when it is read.

    Raises:
        CheckpointError: they do not fit each other, or the first is no delta.
    """
    size = _measure_norms(delta)
    if size is not None and not size < _LARGEST_OF_DELTA:
        raise CheckpointError(
            f"{delta.path} holds whole weights and no delta: its norms are not near 0 (up to "
            f"{size:.2g} in the mean). Leave --base out."
        )
    used = {n: place for n, place in delta.places.items() if not matches(n, UNUSED_LANGUAGE)}
    if missing := [name for name in used if name not in base.places]:
        raise CheckpointError(
            f"{base.path} lacks {list_some(missing)}, to which {delta.path} adds. Give --base the "
            "LLaMA of the same size, in the form for transformers."
        )
    summed = {name: _sum(name, place, base.places[name]) for name, place in used.items()}
    return Inventory(delta.path, {**delta.places, **summed})


def _measure_norms(language: Inventory) -> float | None:
    """The mean absolute value of the largest norm, or None where there is none to read."""
    reader = Reader()
    sizes = [
        reader.read(place).float().abs().mean()
        for place in language.only(_NORMS).places.values()
        if place.dtype.is_floating_point
    ]
    return float(torch.stack(sizes).max()) if sizes else None


def _sum(name: str, delta: Place, base: Place) -> Place:
    is_longer = name in _WORD_TABLES and delta.shape[0] > base.shape[0]
    if base.shape[is_longer:] != delta.shape[is_longer:]:
        raise CheckpointError(
            f"{base.path}: {base.name} is {show_shape(base.shape)}, and {delta.path} adds "
            f"{show_shape(delta.shape)} to it. Give --base the LLaMA of the same size."
        )
    dtype = torch.promote_types(delta.dtype, base.dtype)
    return replace(delta, dtype=dtype, others=(base,), make=partial(_add, dtype))


def _add(dtype: torch.dtype, tensors: Sequence[Tensor]) -> Tensor:
    """Rows that the base has not are added to nothing, as FastChat adds them."""
    delta, base = tensors
    total = delta.to(dtype, copy=True)
    total[: len(base)] += base
    return total
