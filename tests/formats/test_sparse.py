"""What 2:4 formats keep, and where it lies."""

import pytest
import torch

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.sparse import SPARSE_FORMATS

FORMATS = list(SPARSE_FORMATS.values())


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda each: each.name)
def test_two_of_four_are_kept_and_the_largest(chosen):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    found = chosen.unpack(chosen.pack(weight))
    for row in range(6):
        for first in range(0, 32, 4):
            four, kept = weight[row, first : first + 4], found[row, first : first + 4]
            largest = sorted(range(4), key=lambda place: -abs(float(four[place])))[:2]
            assert {place for place in range(4) if kept[place] != 0} == set(largest)
            for place in largest:
                assert float(kept[place]) == pytest.approx(float(four[place]), abs=0.05)


def test_positions_are_two_bits_each_from_the_lowest_up():
    chosen = SPARSE_FORMATS["w8a16-sparse24"]
    weight = torch.tensor([[0.0, 3, 0, -1, 2, 0.1, -0.2, 4]])
    parts = chosen.pack(weight)
    assert parts["weight_values"].shape == (1, 4)
    assert int(parts["weight_positions"]) == 1 | 3 << 2 | 0 << 4 | 3 << 6
    kept = parts["weight_values"] * parts["weight_scale"]
    torch.testing.assert_close(kept, torch.tensor([[3.0, -1.0, 2.0, 4.0]]), atol=0.05, rtol=0)


def test_the_largest_are_kept_and_scales_follow_the_inputs():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 64, generator=generator)
    inputs = torch.randn(500, 64, generator=generator)
    # The largest weight of each row is hardly read: to clip it costs less than coarser steps.
    weight[:, 0], inputs[:, 0] = 30.0, inputs[:, 0] * 1e-4
    chosen = SPARSE_FORMATS["w8a16-sparse24"]
    by_inputs = chosen.unpack(chosen.pack_by_inputs(weight, inputs.square().sum(0)))
    plain = chosen.unpack(chosen.pack(weight))
    for row, found in zip(weight.view(-1, 4), by_inputs.view(-1, 4), strict=True):
        assert set(found.nonzero().flatten().tolist()) <= set(row.abs().topk(2).indices.tolist())
    truth = inputs @ (weight * (plain != 0)).T
    errors = [float((inputs @ each.T - truth).square().mean()) for each in (by_inputs, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_a_weight_takes_five_bits():
    parts = SPARSE_FORMATS["w8a8-sparse24"].pack(torch.randn(64, 4096))
    num_bytes = sum(part.nbytes for part in parts.values())
    assert 8 * num_bytes / (64 * 4096) == pytest.approx(5, abs=0.01)


def test_sizes_that_cannot_be_held_are_refused():
    with pytest.raises(ConfigError, match=r"12 inputs, as 8 does not divide them"):
        SPARSE_FORMATS["w8a16-sparse24"].parts(4, 12)
