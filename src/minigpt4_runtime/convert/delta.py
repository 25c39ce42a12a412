"""A delta: a language model published as the difference from another one, its base.

Owns   the recognition of a delta, and its sum with a base, weight by weight.
Takes  inventories; gives an inventory whose recipes add the two when they are read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import list_some, show_shape
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.key_map import UNUSED_LANGUAGE, matches
from minigpt4_runtime.convert.recipe import Reader, Recipe
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
    """The sum of both, computed when it is read.

    Raises:
        CheckpointError: they do not fit each other, or the first is no delta.
    """
    size = _measure_norms(delta)
    if size is not None and not size < _LARGEST_OF_DELTA:
        raise CheckpointError(
            f"{delta.path} holds whole weights and no delta: its norms are not near 0 (up to "
            f"{size:.2g} in the mean). Leave --base out."
        )
    used = {n: each for n, each in delta.recipes.items() if not matches(n, UNUSED_LANGUAGE)}
    if missing := [name for name in used if name not in base.recipes]:
        raise CheckpointError(
            f"{base.path} lacks {list_some(missing)}, to which {delta.path} adds. Give --base the "
            "LLaMA of the same size, in the form for transformers."
        )
    for name in used:
        _check_shapes(name, delta, base)
    return delta.overlaid(
        {name: Recipe.joined([each, base.recipes[name]], _add) for name, each in used.items()}
    )


def _measure_norms(language: Inventory) -> float | None:
    """The mean absolute value of the largest norm, or None where there is none to read."""
    reader = Reader()
    sizes = [
        reader.read(norm).float().abs().mean()
        for norm in language.only(_NORMS).recipes.values()
        if norm.dtype.is_floating_point
    ]
    return float(torch.stack(sizes).max()) if sizes else None


def _check_shapes(name: str, delta: Inventory, base: Inventory) -> None:
    added, shape = delta.recipes[name].shape, base.recipes[name].shape
    is_longer = name in _WORD_TABLES and added[0] > shape[0]
    if shape[is_longer:] != added[is_longer:]:
        raise CheckpointError(
            f"{base.recipes[name].origin} is {show_shape(shape)}, and {delta.path} adds "
            f"{show_shape(added)} to it. Give --base the LLaMA of the same size."
        )


def _add(tensors: Sequence[Tensor]) -> Tensor:
    """As FastChat adds them: rows that only the delta has stay as they are."""
    delta, base = tensors
    total = delta.to(torch.promote_types(delta.dtype, base.dtype), copy=True)
    total[: len(base)] += base
    return total
