"""Scaling before rounding: AWQ (Lin et al., MLSys 2024, arXiv 2306.00978).

Owns   the search for the scales of a layer's inputs, and their folding into what makes the inputs.
Takes  a layer of floats, what is known of its inputs, and an IntegerFormat; changes the layer.
Never  rounds the layer, and never changes what it computes by more than the rounding of floats.

A column of a weight that reads large inputs is multiplied by a scale above one and its input is
divided by it, so that the column is rounded more finely. Scales are a power of each input's mean
magnitude; the power is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4_runtime.formats.integer import IntegerFormat
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import LlamaLayer

# Zero leaves the weight as it is.
POWERS = tuple(step / 20 for step in range(21))
# Magnitudes count as no further than this from their mean, so that float16 holds what is scaled.
FURTHEST = 256.0
# The search looks at so many outputs: they share the scales, and differ little in what they want.
_MOST_OUTPUTS = 1024
# What makes an input, and the weights that read it.
_READERS: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("attention.query", "attention.key", "attention.value"),
    "attention.value": ("attention.out",),
    "mlp_norm": ("mlp_gate", "mlp_up"),
    "mlp_up": ("mlp_down",),
}


@dataclass(frozen=True)
class Inputs:
    """Sums over all inputs x (in,) of one weight: of x · xᵀ (in, in), and of |x| (in,); float32."""

    products: Tensor
    magnitudes: Tensor

    def importance(self, scales: Tensor) -> Tensor:
        """How much the square of an error in each column counts where it is scaled: (in,)."""
        squares = self.products.diagonal()
        # A column whose input was always zero counts for something, or its group would be lost.
        return squares.clamp(min=1e-6 * float(squares.mean()) or 1.0) / scales.square()


def find_scales(weights: Sequence[Tensor], inputs: Inputs, chosen: IntegerFormat) -> Tensor | None:
    """The scales (in,) for which the rounded weights' outputs have the least square error.

    The weights (out, in) read the same inputs. None: they are best left as they are.
    """
    step = -(-sum(len(weight) for weight in weights) // _MOST_OUTPUTS)
    weight = torch.cat([weight[::step] for weight in weights]).float()
    magnitudes = inputs.magnitudes / inputs.magnitudes.mean().clamp(min=1e-30)
    magnitudes = magnitudes.clamp(1 / FURTHEST, FURTHEST)
    trials = [magnitudes**power if power else None for power in POWERS]
    return min(trials, key=lambda scales: _output_error(weight, scales, inputs, chosen))


def _output_error(
    weight: Tensor, scales: Tensor | None, inputs: Inputs, chosen: IntegerFormat
) -> float:
    """The sum of squares of what rounding changes in the outputs, over all inputs."""
    if scales is None:
        found = chosen.to_floats(*chosen.round(weight))
    else:
        scaled = chosen.round(weight * scales, inputs.importance(scales))
        found = chosen.to_floats(*scaled) / scales
    change = found - weight
    return float((change @ inputs.products).mul_(change).sum())


def scale_layer(
    layer: LlamaLayer,
    inputs: Mapping[str, Inputs],
    chosen: IntegerFormat,
    norm_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Scale a layer; `inputs` has those of each Linear. Gives the scales by the weights' names."""
    found = {
        maker: find_scales(
            [layer.get_submodule(name).get_parameter("weight") for name in readers],
            inputs[readers[0]],
            chosen,
        )
        for maker, readers in _READERS.items()
        if maker != "attention.value" or not _shares_heads(layer)
    }
    return fold(
        layer, {maker: each for maker, each in found.items() if each is not None}, norm_dtype
    )


def _shares_heads(layer: LlamaLayer) -> bool:
    """Whether several heads read one value, which cannot be scaled for each of them."""
    return layer.attention.value.shape[0] != layer.attention.out.shape[1]


def fold(
    layer: LlamaLayer, scales: Mapping[str, Tensor], norm_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Divide what makes an input by its scales, and multiply what reads it.

    A norm is kept in `norm_dtype`: scales become those by which it is divided when it is rounded to
    that. Gives them by the names of the weights that read the input.
    """
    done = {}
    for maker, wanted in scales.items():
        module = layer.get_submodule(maker)
        before = module.get_parameter("weight")
        if isinstance(module, Linear):
            exact, after = wanted, before / wanted[:, None]
        else:
            after = (before / wanted).to(norm_dtype).float()
            can = after.isfinite() & (after != 0)
            after = torch.where(can, after, before)
            exact = torch.where(can, before / after, 1.0)
        before.copy_(after)
        for name in _READERS[maker]:
            layer.get_submodule(name).get_parameter("weight").mul_(exact)
            done[name] = exact
    return done
