"""Rotary positions (Su et al., 2021), plain or stretched beyond the length of training.

Upstream: transformers' modeling_rope_utils.

Owns   the speed at which each pair of a head turns, and the turning of heads by their positions.
Takes  a LanguageConfig with its RopeScaling, and the positions of a step.
Never  sees a length: the tables are the same for any, because cached keys are turned already.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.rope_scaling import RopeScaling


class Rotation:
    """The turns of the tokens of one step, shared by all layers.

    `cos` and `sin` are (T, 1, D); the first half of a sine has the other sign.
    """

    def __init__(self, positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> None:
        angles = positions.float()[:, None] * rotary_speeds(config, positions.device)
        cos, sin = angles.cos(), angles.sin()
        if config.rope_scaling is not None and config.rope_scaling.attention_scale != 1:
            cos, sin = (side * config.rope_scaling.attention_scale for side in (cos, sin))
        cos, sin = cos.to(dtype), sin.to(dtype)
        self.cos = torch.cat([cos, cos], dim=-1)[:, None]
        self.sin = torch.cat([-sin, sin], dim=-1)[:, None]

    def __call__(self, heads: Tensor) -> Tensor:
        """(T, H, D) → (T, H, D): the first half of a head turns against the second."""
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return torch.addcmul(heads * self.cos, swapped, self.sin)


@lru_cache(maxsize=64)
def rotary_speeds(config: LanguageConfig, device: torch.device) -> Tensor:
    """(D / 2,) float32: by how much each pair of a head turns from one position to the next."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    speeds, scaling = 1.0 / config.rope_theta**exponents, config.rope_scaling
    if scaling is None:
        return speeds.to(device)
    if scaling.rope_type == "linear":
        return (speeds / scaling.factor).to(device)
    kept = (_kept_by_yarn if scaling.rope_type == "yarn" else _kept_by_llama3)(
        config, scaling, speeds
    )
    return (speeds / scaling.factor * (1 - kept) + speeds * kept).to(device)


def _kept_by_llama3(config: LanguageConfig, scaling: RopeScaling, speeds: Tensor) -> Tensor:
    """The share of each speed that stays: by how often it turns within the length of training."""
    turns = config.trained_length * speeds / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(config: LanguageConfig, scaling: RopeScaling, speeds: Tensor) -> Tensor:
    """The same for YaRN (Peng et al., 2023), in a ramp over the numbers of the pairs."""

    def pair_that_turns(times: float) -> float:
        wavelength = config.trained_length / (times * 2 * math.pi)
        return len(speeds) * math.log(wavelength) / math.log(config.rope_theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    pairs = torch.arange(len(speeds), device="cpu")
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
