"""What 8-bit floats keep of a number, and where they keep more than whole numbers do."""

import pytest
import torch

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.float8 import FLOAT8
from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise


def test_a_number_keeps_three_bits_behind_its_first():
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4, 5] = 0, 100.0
    parts = FLOAT8.pack(weight)
    found = FLOAT8.unpack(parts)
    # Down to 2 ** -6 of what the largest number of a row, 448, stands for.
    is_normal = weight.abs() >= parts["weight_scale"] / 64
    assert is_normal[:, 0].sum() > 30
    assert ((found - weight).abs()[is_normal] <= weight.abs()[is_normal] / 16 * 1.001).all()
    assert ((found - weight).abs() <= parts["weight_scale"] / 1024 * 1.001)[~is_normal].all()
    assert torch.equal(found[3], weight[3])
    assert found[4, 5] == pytest.approx(100.0, rel=1e-6)


def test_a_number_far_outside_costs_the_others_nothing_and_whole_numbers_cost_less_without():
    """Of rows: one input is large in all of them, and the weight does not read it."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 256, generator=generator)
    weight = torch.randn(48, 256, generator=generator)
    weight[:, 7] = 0
    errors = {}
    for outside in (1.0, 100.0):
        rows[:, 7] = outside
        for chosen in (FLOAT8, INTEGER_FORMATS["w8a8"]):
            found = chosen.multiply(rows, chosen.pack(weight), None)
            errors[chosen.name, outside] = float((found - rows @ weight.T).square().mean())
    assert errors["w8a8-fp8", 100.0] == pytest.approx(errors["w8a8-fp8", 1.0], rel=0.5)
    assert errors["w8a8-fp8", 1.0] > 8 * errors["w8a8", 1.0]
    assert errors["w8a8", 100.0] > 20 * errors["w8a8-fp8", 100.0]


def test_calibration_is_refused_in_words(golden_model_dir, tmp_path):
    plan = QuantisePlan(weights="w8a8-fp8")
    with pytest.raises(ConfigError, match="--calibrate has no method for it"):
        quantise(golden_model_dir("vicuna"), tmp_path / "out", plan, calibrate=tmp_path)
    assert not (tmp_path / "out").exists()
