"""LoRA adapters beside a projection: changes of low rank to the language model's weights.

Owns   the names of adapters, and their sum with the weights that they belong to.
Takes  the language model's inventory and the adapters' recipes; gives an inventory whose recipes
       add the two when they are read, or what config.json says of adapters that are kept apart.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FLOATS_WANTED
from minigpt4_runtime.checkpoint.weights import show_shape
from minigpt4_runtime.config import AdapterConfig
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.key_map import own_name
from minigpt4_runtime.convert.recipe import Recipe
from minigpt4_runtime.errors import CheckpointError

# Upstream's default (minigpt_v2.py, minigpt_base.py) and that of the published checkpoint.
DEFAULT_ALPHA = 16.0

_FACTOR = re.compile(r"(.+)\.lora_[AB]\.weight")


def split_adapters(recipes: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The factors of adapters, and all other weights."""
    factors = {name: each for name, each in recipes.items() if _FACTOR.fullmatch(name)}
    return factors, {name: each for name, each in recipes.items() if name not in factors}


def keep_adapters(factors: Mapping[str, Recipe], alpha: float) -> AdapterConfig | None:
    """What config.json says of factors that stay beside their weights; None if there are none.

    The factors are those of a successful `merge_adapters`.

    Raises:
        CheckpointError: one belongs to another weight than a layer's.
    """
    ranks = {}
    for owner in _owners(factors):
        low, name = factors[f"{owner}.lora_A.weight"], own_name(owner)
        if name is None:
            raise CheckpointError(
                f"{low.origin} is a LoRA factor outside the layers, which only a merge can take. "
                "Leave --keep-lora out."
            )
        ranks[name] = low.shape[0]
    return AdapterConfig(alpha, tuple(ranks.items())) if ranks else None


def merge_adapters(language: Inventory, factors: Mapping[str, Recipe], alpha: float) -> Inventory:
    """The same, with B·A·alpha/r added to each weight W that has the factors A and B of rank r.

    Raises:
        CheckpointError: a factor has no counterpart or no weight, or their shapes do not fit.
    """
    return language.overlaid(
        {f"{owner}.weight": _merge(language, owner, factors, alpha) for owner in _owners(factors)}
    )


def _owners(factors: Mapping[str, Recipe]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".lora_")[0] for name in factors))


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
