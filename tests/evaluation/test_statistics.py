"""Intervals, wins and samples are exact, and the same on every machine."""

import math
import random
import statistics

import numpy
import pytest

from minigpt4_runtime.evaluation.statistics import (
    PairedComparison,
    bootstrap_interval,
    draw_sample,
)


def gaussian(size, *, seed):
    draws = random.Random(seed)
    return [draws.gauss(3, 2) for _ in range(size)]


def test_wins_ties_and_losses():
    compared = PairedComparison.of([0.5, 0.0, -0.25, 0.25, 0.0, 1.0])
    assert (compared.wins, compared.ties, compared.losses) == (3, 2, 1)
    assert compared.mean_difference == 0.25
    assert compared.low < 0.25 < compared.high


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_interval_is_that_of_a_plain_derivation(size):
    """One resample after the other, and the quantiles by interpolating between sorted means."""
    values = gaussian(size, seed=size)
    draws = numpy.random.RandomState(5)
    means = sorted(
        statistics.fmean(values[index] for index in draws.randint(0, size, size, dtype=numpy.int64))
        for _ in range(1000)
    )

    def quantile(share):
        place = share * (len(means) - 1)
        below = math.floor(place)
        above = min(below + 1, len(means) - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    found = bootstrap_interval(values, num_resamples=1000, confidence=0.9, seed=5)
    assert found == pytest.approx((quantile(0.05), quantile(0.95)), abs=1e-12)


def test_the_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = gaussian(50, seed=1)
    at_once = bootstrap_interval(values)
    monkeypatch.setattr("minigpt4_runtime.evaluation.statistics._MAX_DRAWN", 300)
    assert bootstrap_interval(values) == pytest.approx(at_once, abs=1e-12)


def test_the_interval_is_as_wide_as_theory_says():
    values = gaussian(2000, seed=2)
    low, high = bootstrap_interval(values)
    half = 1.959964 * statistics.pstdev(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (statistics.fmean(values) - half, statistics.fmean(values) + half), abs=0.1 * half
    )


def test_a_seed_gives_the_same_interval_again():
    values = [0.1, 0.5, -0.3, 0.2, 0.7]
    first, again, other = (
        bootstrap_interval(values, num_resamples=100, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again != other
    # Pinned: no machine and no version may draw otherwise.
    assert first == pytest.approx((-0.1105, 0.5305))


NAMES = [f"{number:03}.jpg" for number in range(500)]


def test_a_seed_draws_the_same_names_everywhere():
    drawn = draw_sample(NAMES, 4, seed=0)
    # Pinned: no machine and no version may draw otherwise.
    assert drawn == ["183.jpg", "240.jpg", "310.jpg", "497.jpg"]
    assert draw_sample(NAMES[::-1], 4, seed=0) == drawn
    assert draw_sample(NAMES, 4, seed=1) != drawn


def test_a_larger_sample_holds_the_smaller_one_and_strangers_push_nobody_back():
    drawn = draw_sample(NAMES, 100, seed=7)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 100
    assert set(draw_sample(NAMES, 20, seed=7)) < set(drawn)
    assert [name for name in draw_sample([*NAMES, "x"], 101, seed=7) if name in drawn] == drawn


def test_of_fewer_all_are_drawn():
    assert draw_sample(["b", "a", "caf\udce9"], 9, seed=0) == ["a", "b", "caf\udce9"]


def test_lots_are_fair():
    """Each of 50 names comes in about a fifth of 2,000 samples of 10."""
    counts = dict.fromkeys(NAMES[:50], 0)
    for seed in range(2000):
        for name in draw_sample(NAMES[:50], 10, seed=seed):
            counts[name] += 1
    # Five standard deviations of a binomial.
    assert all(abs(count - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8) for count in counts.values())


def test_where_the_pictures_begin_does_not_change_the_sample():
    names = [f"{folder}/{number}.jpg" for folder in ("cats", "dogs") for number in range(40)]
    deeper = [f"all/val/{name}" for name in names]
    drawn = draw_sample(names, 15, seed=2)
    assert draw_sample(deeper, 15, seed=2) == [f"all/val/{name}" for name in drawn]
    alone = [name.removeprefix("dogs/") for name in names if name.startswith("dogs/")]
    drawn = draw_sample(alone, 15, seed=2)
    assert draw_sample([f"dogs/{name}" for name in alone], 15, seed=2) == [
        f"dogs/{name}" for name in drawn
    ]
