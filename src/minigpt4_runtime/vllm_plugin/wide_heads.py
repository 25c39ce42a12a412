"""Narrow attention heads, widened with zeros to a width that vLLM's attention has.

Owns   the places of a head's numbers in a wider one, such that every score stays what it was.
Takes  published weights, floats or integers of 8 bits with a scale for each row; gives them wider.
       Llama's own heads of 128 never need it.

Rotary positions turn the numbers i and i + d/2 of a head together, at a speed that depends on i/d.
In a head r times as wide the number i lies at r·i of its half, so pairs and speeds are the same.
Attention divides scores by the root of the width; queries are larger by the root of r.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minigpt4_runtime.errors import ConfigError


def widen_factor(head_dim: int, known: Sequence[int]) -> int:
    """How many times wider the heads have to be for a width in `known`.

    Raises:
        ConfigError: none of them is a multiple.
    """
    factors = [width // head_dim for width in known if width % head_dim == 0]
    if not factors:
        raise ConfigError(
            f"The model's attention heads are {head_dim} wide; vLLM has "
            f"{', '.join(map(str, known))}, and none is a multiple. Run it with minigpt4 itself."
        )
    return min(factors)


def widen(
    weights: Iterator[tuple[str, Tensor]], head_dim: int, factor: int
) -> Iterator[tuple[str, Tensor]]:
    """Weights by their published names → the same, with heads `factor` times as wide."""
    for name, weight in weights:
        owner, _, part = name.rpartition(".")
        kind = owner.rpartition(".")[2]
        if kind == "o_proj" and part == "weight":
            yield name, _spread(weight.T, head_dim, factor).T
        elif kind in {"q_proj", "k_proj", "v_proj"}:
            spread = _spread(weight, head_dim, factor)
            is_scaled = kind == "q_proj" and spread.is_floating_point()
            yield name, spread * factor**0.5 if is_scaled else spread
        else:
            yield name, weight


def _spread(rows: Tensor, head_dim: int, factor: int) -> Tensor:
    """(H · d, C) → (H · d · factor, C), with zeros between."""
    heads = rows.reshape(-1, head_dim, 1, rows.shape[1])
    empty = torch.zeros_like(heads).expand(-1, -1, factor - 1, -1)
    return torch.cat([heads, empty], dim=2).reshape(-1, rows.shape[1]).contiguous()
