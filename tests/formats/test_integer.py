"""What integer formats store, number by number, and how well it stands for the floats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.integer import INTEGER_FORMATS, pack_words, unpack_words
from minigpt4_runtime.formats.rounding import round_rows

FORMATS = list(INTEGER_FORMATS.values())


def draw_weight(chosen, seed, rows=16):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 256, generator=draw)
    # A few numbers far from all others, as in trained models.
    return weight + 6 * weight * (torch.rand(rows, 256, generator=draw) > 0.99)


def stored_integers(chosen, parts):
    if chosen.bits == 8:
        return parts["weight"], parts.get("weight_zero_point")
    zero = parts.get("weight_zero_point")
    zero = None if zero is None else unpack_words(zero.T.contiguous()).T
    return unpack_words(parts["weight_packed"]), zero


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda each: each.name)
def test_a_number_is_integer_less_zero_point_times_scale(chosen):
    weight = draw_weight(chosen, seed=1)
    parts = chosen.pack(weight)
    integers, zero = stored_integers(chosen, parts)
    low, high = chosen.limits
    assert low <= int(integers.min()) < 0 < int(integers.max()) <= high
    size = chosen.group_size or 256
    for row, column in ((0, 0), (3, 255), (15, 128), (7, 63)):
        group = column // size
        offset = 0 if zero is None else int(zero[row, group])
        scale = float(parts["weight_scale"][row, group])
        wanted = (int(integers[row, column]) - offset) * scale
        assert float(chosen.unpack(parts)[row, column]) == pytest.approx(wanted, rel=1e-6)
    assert (zero is None) == chosen.is_symmetric


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_beats_the_range_of_the_largest_number(chosen, seed):
    weight = draw_weight(chosen, seed=seed)
    found = (chosen.unpack(chosen.pack(weight)) - weight).square().mean()
    groups = weight.unflatten(1, (-1, chosen.group_size or 256))
    low, high = chosen.limits
    if chosen.is_symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / high
        plain = (groups / scale).round() * scale
    else:
        least = groups.amin(-1, keepdim=True).clamp(max=0)
        scale = (groups.amax(-1, keepdim=True).clamp(min=0) - least) / (high - low)
        zero = (-least / scale).round()
        plain = ((groups / scale + zero).round().clamp(0, high - low) - zero) * scale
    error = (plain.flatten(1) - weight).square().mean()
    # At 8 bits the whole range is best or nearly so; at 4 bits a shorter one wins clearly.
    assert found <= error * (1.005 if chosen.bits == 8 else 0.97 if chosen.group_size > 32 else 1)


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda each: each.name)
def test_the_product_is_that_of_the_unpacked_matrix(chosen):
    weight = draw_weight(chosen, seed=5)
    parts, rows, bias = chosen.pack(weight), torch.randn(4, 256), torch.randn(16)
    taken = rows
    if chosen.rounds_rows:
        groups = rows.unflatten(1, (-1, chosen.group_size or 256))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        taken = ((groups / scale).round() * scale).flatten(1)
        assert not torch.equal(taken, rows)
    wanted = taken @ chosen.unpack(parts).T + bias
    torch.testing.assert_close(chosen.multiply(rows, parts, bias), wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), words=st.integers(1, 5), seed=st.integers(0, 999))
def test_words_hold_eight_numbers_from_the_lowest_bits_up(rows, words, seed):
    draw = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (rows, 8 * words), generator=draw).to(torch.int8)
    packed = pack_words(integers)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_words(packed), integers)
    for row, column in ((0, 0), (rows - 1, 8 * words - 1)):
        word = int(packed[row, column // 8]) & 0xFFFFFFFF
        assert (word >> 4 * (column % 8) & 15) - 8 == int(integers[row, column])


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda each: each.name)
def test_weights_of_zeros_and_of_the_smallest_floats(chosen):
    for value in (0.0, 1e-30, 1e-6):
        weight = torch.full((8, 128), value)
        weight[0, 0] = 0
        found = chosen.unpack(chosen.pack(weight))
        assert found.isfinite().all()
        assert float((found - weight).abs().max()) <= max(value, 1e-7)
    assert float(round_rows(torch.zeros(2, 128), 128).abs().max()) == 0


def test_sizes_that_cannot_be_held_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"96 inputs, as 64 does not.*: take groups of 32\."):
        INTEGER_FORMATS["w4a16-g64"].parts(8, 96)
    with pytest.raises(ConfigError, match=r"588 inputs, as 32 .*: take a format without groups\."):
        INTEGER_FORMATS["w8a8-g32"].parts(8, 588)
    with pytest.raises(ConfigError, match=r"12 outputs, as 8 .*: take a symmetric format\."):
        INTEGER_FORMATS["w4a16-g32-asymmetric"].parts(12, 64)
