"""The numbers that people compare, against Python's own statistics and by hand."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime.bench.spread import Spread, noise

VALUES = st.lists(st.floats(0, 1e6), min_size=2, max_size=60)


@given(VALUES)
def test_percentiles_are_those_of_python(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    spread = Spread.of(values)
    found = (spread.p50, spread.p90, spread.p99)
    assert found == pytest.approx((cuts[49], cuts[89], cuts[98]), abs=1e-6)


def test_by_hand():
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 4.0)
    assert Spread.of([10.0, 1.0, 2.0]).p50 == 2.0
    assert Spread.of([10.0, 1.0, 2.0]).p90 == pytest.approx(8.4)
    hundred_one = Spread.of([float(value) for value in range(101)])
    assert (hundred_one.mean, hundred_one.p50) == (50.0, 50.0)
    assert (hundred_one.p90, hundred_one.p99) == pytest.approx((90.0, 99.0))


def test_noise_is_half_the_range_beside_the_median():
    assert noise([9.0, 10.0, 12.0]) == pytest.approx(0.15)
    assert noise([7.0, 7.0]) == 0.0
    assert noise([7.0]) is None
