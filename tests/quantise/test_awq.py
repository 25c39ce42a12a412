"""AWQ against a derivation of its own, against plain rounding, and its folding."""

import numpy as np
import pytest
import torch

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import LlamaLayer
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.model.row_operations import Residual
from minigpt4_runtime.quantise.awq import Inputs, find_scales, fold, scale_layer

W4 = INTEGER_FORMATS["w4a16-g32"]
NAMES = ["w8a16", "w4a16-g32", "w4a16-g64-asymmetric", "w4a8-g32"]


def draw(seed, out_features=24, in_features=128, rows=300):
    """A weight, and inputs of which a few are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(in_features, generator=generator) + 0.5
    sizes[torch.randperm(in_features, generator=generator)[: in_features // 25]] *= 20
    inputs = torch.randn(rows, in_features, generator=generator) * sizes
    return torch.randn(out_features, in_features, generator=generator), inputs


def sums_of(inputs):
    return Inputs(inputs.T @ inputs, inputs.abs().sum(0))


def output_error(weight, inputs, chosen, scales):
    """Of a weight that is rounded as it is, or scaled first."""
    if scales is None:
        found = chosen.unpack(chosen.pack(weight))
    else:
        importance = sums_of(inputs).importance(scales)
        found = chosen.unpack(chosen.store(*chosen.round(weight * scales, importance)))
        found = found / scales
    return float((inputs @ (found - weight).T).square().sum())


def derived_rounding(group, weights, low, high, kept):
    """A group of floats on its best grid of nine, number by number, in float64."""
    largest = group[np.argmax(np.abs(group))]
    end = largest / low if -low > high else abs(largest) / high
    best_error, best_scale = np.inf, None
    for step in range(9):
        integers = np.clip(np.rint(group / (end * (1 - 0.05 * step))), low, high)
        scale = (weights * integers * group).sum() / (weights * integers**2).sum()
        error = (weights * (group - integers * scale) ** 2).sum()
        if error < best_error:
            best_error, best_scale = error, scale
    scale = float(kept(best_scale))
    return np.clip(np.rint(group / scale), low, high) * scale


def derived_scales(weight, inputs, chosen, furthest=256.0):
    """Every power of the grid, judged by the outputs themselves and not by sums of products."""
    weight, inputs = weight.double().numpy(), inputs.double().numpy()
    size = chosen.group_size or weight.shape[1]
    kept = np.float16 if chosen.group_size else np.float32
    magnitudes = np.abs(inputs).mean(0)
    magnitudes = np.clip(magnitudes / magnitudes.mean(), 1 / furthest, furthest)
    best_error, best = np.inf, None
    for power in np.arange(21) / 20:
        scales = magnitudes**power
        weights = (inputs**2).mean(0) / scales**2 if power else np.ones(weight.shape[1])
        found = np.empty_like(weight)
        for number, row in enumerate(weight * scales):
            for first in range(0, len(row), size):
                some = slice(first, first + size)
                found[number, some] = derived_rounding(
                    row[some], weights[some], *chosen.limits, kept
                )
        error = ((inputs @ (found / scales - weight).T) ** 2).sum()
        if error < best_error:
            best_error, best = error, scales
    return best


@pytest.mark.parametrize("name", ["w8a16", "w4a16-g32", "w4a16-g64"])
@pytest.mark.parametrize("seed", range(3))
def test_scales_are_those_of_the_derivation(name, seed):
    chosen = INTEGER_FORMATS[name]
    weight, inputs = draw(seed, out_features=12)
    # Two weights that read the same inputs share their scales.
    found = find_scales([weight[:4], weight[4:]], sums_of(inputs), chosen)
    wanted = torch.from_numpy(derived_scales(weight, inputs, chosen)).float()
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_never_further_than_by_plain_rounding(name, seed):
    chosen = INTEGER_FORMATS[name]
    weight, inputs = draw(seed)
    scales = find_scales([weight], sums_of(inputs), chosen)
    plain, scaled = (output_error(weight, inputs, chosen, each) for each in (None, scales))
    assert scaled < 0.9 * plain
    # Where all inputs are alike there is little to gain, and nothing is lost.
    alike = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
    scales = find_scales([weight], sums_of(alike), chosen)
    plain, scaled = (output_error(weight, alike, chosen, each) for each in (None, scales))
    assert scaled <= plain * (1 + 1e-5)


def test_what_rounds_without_an_error_is_left_alone():
    weight = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::32] = -8
    assert find_scales([weight], sums_of(draw(1)[1]), W4) is None


def test_some_outputs_of_many_stand_for_all():
    weight, inputs = draw(seed=2, out_features=3000, in_features=64)
    scales = find_scales([weight[:2000], weight[2000:]], sums_of(inputs), W4)
    plain, scaled = (output_error(weight, inputs, W4, each) for each in (None, scales))
    assert scaled < 0.9 * plain


def test_inputs_that_never_come():
    weight, inputs = draw(seed=3)
    inputs[:, 7:70] = 0
    scales = find_scales([weight], sums_of(inputs), W4)
    importance = sums_of(inputs).importance(scales)
    found = W4.unpack(W4.store(*W4.round(weight * scales, importance))) / scales
    assert found.isfinite().all()
    assert float((found - weight).abs().max()) < 1
    assert find_scales([weight], sums_of(torch.zeros(3, 128)), W4) is None


def layer_config(num_key_value_heads=4):
    return LanguageConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=num_key_value_heads, vocab_size=64, max_position_embeddings=64,
        rms_norm_eps=1e-6, rope_theta=10000.0,
    )  # fmt: skip


def draw_layer(num_key_value_heads=4, norm_dtype=torch.float32):
    config = layer_config(num_key_value_heads)
    layer, generator = LlamaLayer(config, 0, Solo()).requires_grad_(False), torch.Generator()
    generator.manual_seed(7)
    for name, weight in layer.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.copy_((1 + 0.3 * drawn).to(norm_dtype))
        else:
            weight.copy_(drawn / weight.shape[1] ** 0.5)
    return layer, torch.randn(40, 64, generator=generator)


def compute(layer, rows):
    rotation = Rotation(torch.arange(len(rows)), layer_config(), rows.dtype)
    return layer(Residual(rows), rotation, causal_attention()).total


def inputs_of(layer):
    return {
        name: sums_of(draw(number, in_features=module.shape[1])[1])
        for number, (name, module) in enumerate(layer.named_modules())
        if hasattr(module, "shape")
    }


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scaled_layer_computes_what_it_did(norm_dtype):
    layer, rows = draw_layer(norm_dtype=norm_dtype)
    wanted = compute(layer, rows)
    before = {name: weight.clone() for name, weight in layer.named_parameters()}
    scales = scale_layer(layer, inputs_of(layer), W4, norm_dtype)
    assert set(scales) == {name.removesuffix(".weight") for name in before if "norm" not in name}
    assert all(float(each.std()) > 0.1 for each in scales.values())
    # All weights are others, norms too, which their dtype still holds.
    after = dict(layer.named_parameters())
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(layer.mlp_norm.weight, layer.mlp_norm.weight.to(norm_dtype).float())
    torch.testing.assert_close(compute(layer, rows), wanted, rtol=1e-4, atol=1e-4)
    # The scales are those by which the weights were multiplied.
    torch.testing.assert_close(
        after["mlp_gate.weight"], before["mlp_gate.weight"] * scales["mlp_gate"]
    )


def test_a_value_that_heads_share_is_not_scaled():
    layer, rows = draw_layer(num_key_value_heads=2)
    wanted = compute(layer, rows)
    out = layer.attention.out.weight.clone()
    scales = scale_layer(layer, inputs_of(layer), W4, torch.float32)
    assert "attention.out" not in scales
    assert "attention.value" in scales
    assert torch.equal(layer.attention.out.weight, out)
    torch.testing.assert_close(compute(layer, rows), wanted, rtol=1e-4, atol=1e-4)


def test_a_norm_that_cannot_be_divided_is_left():
    layer, rows = draw_layer(norm_dtype=torch.float16)
    layer.mlp_norm.weight[0] = 0
    layer.mlp_norm.weight[1] = 60000
    wanted = compute(layer, rows)
    scales = torch.full((64,), 2.0)
    scales[:2] = 0.5
    found = fold(layer, {"mlp_norm": scales}, torch.float16)
    assert found["mlp_up"][:3].tolist() == [1, 1, pytest.approx(2, rel=1e-3)]
    torch.testing.assert_close(compute(layer, rows), wanted, rtol=1e-4, atol=1e-2)
