"""LoRA adapters beside a projection: changes of low rank to the language model's weights.

Owns   the names of adapters, and their sum with the weights that they belong to.
Takes  the language model's inventory and the adapters' recipes; gives an inventory whose recipes
       add the two when they are read.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FLOATS_WANTED
from minigpt4_runtime.checkpoint.weights import show_shape
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.recipe import Recipe
from minigpt4_runtime.errors import CheckpointError

# Upstream's default (minigpt_v2.py, minigpt_base.py) and that of the published checkpoint.
DEFAULT_ALPHA = 16.0

_FACTOR = re.compile(r"(.+)\.lora_[AB]\.weight")


def split_adapters(recipes: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The factors of adapters, and all other weights."""
    factors = {name: each for name, each in recipes.items() if _FACTOR.fullmatch(name)}
    return factors, {name: each for name, each in recipes.items() if name not in factors}


def merge_adapters(language: Inventory, factors: Mapping[str, Recipe], alpha: float) -> Inventory:
    """The same, with B·A·alpha/r added to each weight W that has the factors A and B of rank r.

    Raises:
        CheckpointError: a factor has no counterpart or no weight, or their shapes do not fit.
    """
    owners = dict.fromkeys(name.rpartition(".lora_")[0] for name in factors)
    return language.overlaid(
        {f"{owner}.weight": _merge(language, owner, factors, alpha) for owner in owners}
    )


def _merge(language: Inventory, owner: str, factors: Mapping[str, Recipe], alpha: float) -> Recipe:
    found = {side: factors.get(f"{owner}.lora_{side}.weight") for side in "AB"}
    weight = language.recipes.get(f"{owner}.weight")
    low, high = found["A"], found["B"]
    given = next(each for each in (low, high) if each is not None)
    if low is None or high is None or weight is None:
        lacking = f"{owner}.weight" if weight is None else "its other factor"
        raise CheckpointError(
            f"{given.origin} is a LoRA factor, and {lacking} is in no file. Give the files that "
            "were published together."
        )
    for each in (low, high, weight):
        if each.dtype not in DTYPE_NAME_OF:
            dtype = str(each.dtype).removeprefix("torch.")
            raise CheckpointError(f"{each.origin} is of dtype {dtype}. {FLOATS_WANTED}")
    fits = len(low.shape) == len(high.shape) == 2 and low.shape[0] == high.shape[1]
    if not fits or (high.shape[0], low.shape[1]) != weight.shape:
        raise CheckpointError(
            f"{low.origin} is {show_shape(low.shape)} and lora_B {show_shape(high.shape)}; their "
            f"product does not fit {weight.origin}, {show_shape(weight.shape)}. Give the language "
            "model that these adapters were trained on."
        )
    return Recipe.joined([weight, low, high], partial(_add, alpha / low.shape[0]))


def _add(scale: float, tensors: Sequence[Tensor]) -> Tensor:
    """W + B·A·scale in float32, then the widest dtype of the three."""
    weight, low, high = (tensor.float() for tensor in tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.addmm(weight, high, low, alpha=scale).to(dtype)
