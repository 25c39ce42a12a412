"""The search for the largest batch, against made-up machines."""

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.bench.ramp_up import find_largest_batch

LIMIT = 50.0


@dataclass(frozen=True)
class Outcome:
    verdict: str


class Machine:
    """A latency for each batch size, and a size from which on memory is too small."""

    def __init__(self, latencies, first_without_memory):
        self.latencies = latencies  # By size, from 1 on.
        self.first_without_memory = first_without_memory
        self.asked = []

    def __call__(self, size):
        self.asked.append(size)
        return Outcome(self.verdict(size))

    def verdict(self, size):
        if size >= self.first_without_memory:
            return "memory"
        return "latency" if self.latencies[size - 1] > LIMIT else "holds"


RANGES = st.integers(1, 400).flatmap(
    lambda largest: st.tuples(st.integers(1, largest), st.just(largest))
)
SEARCH = {"sizes": RANGES, "seed": st.integers(0, 2**32), "memory": st.integers(1, 500)}


def random_machine(seed, memory, largest, *, is_monotone):
    rng = random.Random(seed)
    start, growth = rng.uniform(0.1, 60), rng.uniform(0, 2)
    latencies = [start]
    for _ in range(largest - 1):
        grown = max(0.0, latencies[-1] + rng.expovariate(1) * growth)
        latencies.append(grown if is_monotone else rng.uniform(0, 2) * LIMIT)
    return Machine(latencies, memory)


def check_what_always_holds(machine, smallest, largest):
    found = find_largest_batch(machine, smallest, largest)
    assert list(found.tried) == machine.asked, "every size that was tried is kept, each once"
    assert len(set(machine.asked)) == len(machine.asked)
    assert all(smallest <= size <= largest for size in machine.asked)
    assert len(machine.asked) <= 2 * math.log2(largest - smallest + 1) + 2
    if found.batch_size is None:
        assert machine.asked == [smallest]
        assert found.limit == machine.verdict(smallest) != "holds"
        return found
    assert machine.verdict(found.batch_size) == "holds"
    if found.limit == "range":
        assert found.batch_size == largest
    else:
        assert found.limit == machine.verdict(found.batch_size + 1) != "holds"
    return found


@settings(max_examples=600, deadline=None)
@given(**SEARCH)
def test_the_largest_that_holds_is_found_and_its_limit_is_named(sizes, seed, memory):
    smallest, largest = sizes
    machine = random_machine(seed, memory, largest, is_monotone=True)
    found = check_what_always_holds(machine, smallest, largest)
    holding = [n for n in range(smallest, largest + 1) if machine.verdict(n) == "holds"]
    assert found.batch_size == (max(holding) if holding else None)


@settings(max_examples=300, deadline=None)
@given(**SEARCH)
def test_on_a_restless_machine_the_result_holds_and_the_next_does_not(sizes, seed, memory):
    machine = random_machine(seed, memory, sizes[1], is_monotone=False)
    check_what_always_holds(machine, *sizes)


@pytest.mark.parametrize(
    ("first_without_memory", "batch_size", "limit", "asked"),
    [
        (1000, 10, "latency", [1, 2, 4, 8, 16, 12, 10, 11]),
        (7, 6, "memory", [1, 2, 4, 8, 6, 7]),
        (1, None, "memory", [1]),
    ],
)
def test_doubling_then_bisection(first_without_memory, batch_size, limit, asked):
    machine = Machine([5.0 * size for size in range(1, 257)], first_without_memory)
    found = find_largest_batch(machine, 1, 256)
    assert (found.batch_size, found.limit, machine.asked) == (batch_size, limit, asked)


def test_the_whole_range_may_hold():
    machine = Machine([1.0] * 100, 1000)
    found = find_largest_batch(machine, 3, 100)
    assert (found.batch_size, found.limit) == (100, "range")
    assert machine.asked == [3, 6, 12, 24, 48, 96, 100]


def test_an_error_of_the_measurement_passes_through():
    def fail(size):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        find_largest_batch(fail, 1, 2)
