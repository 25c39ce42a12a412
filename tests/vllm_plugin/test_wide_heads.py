"""Heads with zeros between compute what the narrow ones did."""

import pytest
import torch
from torch.nn import functional

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.vllm_plugin.wide_heads import widen, widen_factor

HEADS, ROWS, WIDTH = 3, 7, 24


def turned(rows, base=10000.0):
    """Rotary positions of (T, H, D), as Hugging Face's Llama has them."""
    half = rows.shape[-1] // 2
    speeds = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(len(rows))[:, None] * speeds)[:, None]
    first, second = rows[..., :half], rows[..., half:]
    return torch.cat([
        first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(),
    ], -1)  # fmt: skip


def attended(hidden, weights):
    q, k, v = (
        (hidden @ weights[f"{name}_proj.weight"].T).view(len(hidden), HEADS, -1) for name in "qkv"
    )
    heads = (rows.transpose(0, 1) for rows in (turned(q), turned(k), v))
    rows = functional.scaled_dot_product_attention(*heads, is_causal=True)
    return rows.transpose(0, 1).flatten(1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("factor", [2, 3])
def test_attention_is_the_same(factor):
    head_dim = 8
    shapes = {name: (HEADS * head_dim, WIDTH) for name in "qkv"} | {"o": (WIDTH, HEADS * head_dim)}
    narrow = {
        f"{name}_proj.weight": torch.randn(shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    wide = dict(widen(iter(narrow.items()), head_dim, factor))
    assert wide["q_proj.weight"].shape == (HEADS * head_dim * factor, WIDTH)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(attended(hidden, wide), attended(hidden, narrow))


def test_integers_keep_their_products():
    """A scale for each row is widened like the rows, and takes the factor of the queries."""
    integers = torch.randint(-127, 128, (8, 5), dtype=torch.int8)
    scale = torch.rand(8, 1)
    parts = {"q_proj.weight": integers, "q_proj.weight_scale": scale}
    wide = dict(widen(iter(parts.items()), 4, 2))
    ((_, floats),) = widen(iter([("q_proj.weight", integers * scale)]), 4, 2)
    assert wide["q_proj.weight"].dtype == torch.int8
    torch.testing.assert_close(wide["q_proj.weight"] * wide["q_proj.weight_scale"], floats)


def test_other_weights_stay():
    weight = torch.randn(4, 4)
    ((name, found),) = widen(iter([("model.layers.0.mlp.up_proj.weight", weight)]), 2, 2)
    assert name.endswith("up_proj.weight")
    assert found is weight


def test_the_smallest_width_is_taken():
    assert widen_factor(16, [32, 64, 80]) == 2
    assert widen_factor(40, [32, 64, 80]) == 2
    assert widen_factor(64, [32, 64, 128]) == 1
    with pytest.raises(ConfigError, match="48 wide; vLLM has 32, 64"):
        widen_factor(48, [32, 64])
