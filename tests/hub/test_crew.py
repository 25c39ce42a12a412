"""Jobs at once: their order, their errors, and that they do run at once."""

import threading
from functools import partial

import pytest

from minigpt4_runtime.hub.crew import run_jobs


def test_results_come_in_the_order_of_the_jobs():
    jobs = [partial(pow, number, 2) for number in range(20)]
    assert run_jobs(jobs, stop=threading.Event()) == [number**2 for number in range(20)]


def test_jobs_run_at_once():
    """Nobody passes the barrier before all four are there."""
    barrier = threading.Barrier(4, timeout=30)
    assert sorted(run_jobs([barrier.wait] * 4, stop=threading.Event())) == [0, 1, 2, 3]


def test_the_first_error_stops_the_others_and_is_raised():
    stop, never = threading.Event(), []

    def fail():
        raise ValueError("the first")

    jobs = [fail, partial(stop.wait, 30), *[partial(never.append, 1)] * 50]
    with pytest.raises(ValueError, match="the first"):
        run_jobs(jobs, stop=stop, num_threads=2)
    assert never == []


def test_no_jobs():
    assert run_jobs([], stop=threading.Event()) == []
