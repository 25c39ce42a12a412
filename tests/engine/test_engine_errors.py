"""What becomes of a request that fails: it ends alone, and its blocks are free."""

import weakref

import pytest
from fake_executor import (
    BOS,
    ENDLESS,
    OUT_OF_MEMORY,
    Executor,
    PacedExecutor,
    by_state,
    events_of,
    ids_of,
    request_of,
    slow_twin,
    submit,
    submit_together,
    wait_until_idle,
)

from minigpt4_runtime import RequestError
from minigpt4_runtime.engine import engine as engine_module
from minigpt4_runtime.engine.request import Heard
from minigpt4_runtime.errors import RankLostError


def long_requests(count, length=9):
    """By state, all of them are answered at length."""
    return [request_of(BOS, number, max_new_tokens=length) for number in (7, 9, 10, 1)[:count]]


def num_sequences(plan):
    return len({piece.sequence_id for piece in plan.slices})


class LosingExecutor(Executor):
    """Loses another rank in mid-step."""

    def execute(self, plan, pixels, choices=None):
        graph = set()  # Something that a weak reference can point to.
        self.graph = weakref.ref(graph)
        raise RankLostError("Rank 1 is gone.") from RuntimeError("connection closed")


class FailingWatch:
    """Fails at the third token of an answer."""

    def __init__(self, num_seen=0):
        self._num_seen = num_seen

    def feed(self, token_id, *, is_last):
        self._num_seen += 1
        if self._num_seen == 3:
            raise ValueError("the watch is broken")
        return Heard()

    def fork(self):
        return FailingWatch(self._num_seen)


def assert_served(engine, tickets, requests):
    """The answers are right, and after them the engine gives one more."""
    assert list(map(ids_of, tickets)) == list(map(slow_twin, requests))
    later = request_of(BOS, 10, max_new_tokens=5)
    assert ids_of(engine.submit(later, lambda event: event)) == slow_twin(later)


def test_after_a_lost_rank_nothing_holds_what_the_step_has_used(start):
    """Else a group of ranks would wait at its end for the graphs of the runner."""
    executor = LosingExecutor()
    engine = start(executor)
    with pytest.raises(RankLostError, match="Rank 1 is gone"):
        events_of(submit(engine, BOS, 9))
    engine.close()
    assert executor.graph() is None


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_error_of_a_watch_ends_that_request_alone(start, num_beams):
    executor = PacedExecutor(by_state)
    engine = start(executor)
    sampling = {"num_beams": num_beams, "max_new_tokens": 50, "ignore_eos": True}
    failing = request_of(BOS, 4, watch=FailingWatch(), **sampling)
    others = long_requests(2)
    ticket, *tickets = submit_together(engine, executor, [failing, *others])
    executor.let_run()
    with pytest.raises(ValueError, match="the watch is broken"):
        events_of(ticket)
    assert_served(engine, tickets, others)


class TornWatch:
    """Cannot be forked as often as is asked."""

    def __init__(self, max_forks):
        self._forks_left = max_forks

    def feed(self, token_id, *, is_last):
        return Heard()

    def fork(self):
        if not self._forks_left:
            raise ValueError("the watch is torn")
        self._forks_left -= 1
        return self


def test_a_watch_that_cannot_be_forked_costs_no_blocks(start):
    engine = start(Executor())
    for max_forks in range(25):
        with pytest.raises(ValueError, match="the watch is torn"):
            events_of(
                submit(engine, BOS, 3, watch=TornWatch(max_forks), num_beams=3, max_new_tokens=50)
            )
    wait_until_idle(engine)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_an_alarm_that_fails_ends_that_request_alone(start):
    def fail():
        raise OSError("out of order")

    executor = PacedExecutor(by_state)
    engine = start(executor)
    failing = [request_of(BOS, number, **ENDLESS) for number in (4, 5)]
    others = long_requests(2)
    *alarmed, first, second = submit_together(engine, executor, [*failing, *others])
    for ticket in alarmed:
        assert ticket.poll(fail) is None
    executor.let_run()
    for ticket in alarmed:
        with pytest.raises(OSError, match="out of order"):
            events_of(ticket)
    assert_served(engine, [first, second], others)


def test_overflow_ends_that_request_alone(start):
    executor = PacedExecutor(by_state)
    engine = start(executor)
    requests = long_requests(3)
    first, overflowing, last = submit_together(engine, executor, requests)
    executor.overflowing = {1}
    executor.let_run()
    with pytest.raises(RequestError, match="overflowed"):
        events_of(overflowing)
    assert_served(engine, [first, last], [requests[0], requests[2]])


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_half_as_many_run_and_all_are_served(start, error):
    executor = PacedExecutor(by_state)
    engine = start(executor)
    requests = long_requests(4)
    executor.trouble = lambda plan: error if len(executor.plans) == 4 else None
    tickets = submit_together(engine, executor, requests)
    executor.let_run()
    assert_served(engine, tickets, requests)
    assert num_sequences(executor.plans[3]) == 4
    assert max(map(num_sequences, executor.plans[4:])) == 2


def test_after_calm_steps_as_many_run_as_before(start, monkeypatch):
    monkeypatch.setattr(engine_module, "CALM_STEPS", 2)
    executor = PacedExecutor(by_state)
    engine = start(executor)
    requests = long_requests(4, length=30)
    executor.trouble = lambda plan: OUT_OF_MEMORY[0] if len(executor.plans) == 4 else None
    tickets = submit_together(engine, executor, requests)
    executor.let_run()
    assert_served(engine, tickets, requests)
    running = [num_sequences(plan) for plan in executor.plans]
    assert running[3:10] == [4, 2, 2, 3, 3, 4, 4]


def test_memory_for_a_single_one_serves_all(start):
    executor = PacedExecutor(by_state)
    engine = start(executor)
    requests = long_requests(4)
    executor.trouble = lambda plan: OUT_OF_MEMORY[0] if num_sequences(plan) > 1 else None
    tickets = submit_together(engine, executor, requests)
    executor.let_run()
    assert_served(engine, tickets, requests)
    assert [num_sequences(plan) for plan in executor.plans[:4]] == [1, 4, 2, 1]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_for_a_single_one_is_said(start, error):
    executor = Executor(by_state)
    engine = start(executor)
    executor.trouble = lambda plan: error if len(executor.plans) == 3 else None
    ticket = submit(engine, BOS, 3, 4, **ENDLESS)
    assert len([next(ticket), next(ticket)]) == 2
    with pytest.raises(RequestError, match="out of memory on a prompt of 3 tokens"):
        next(ticket)
    assert_served(engine, [], [])


def test_another_error_ends_those_that_run_and_no_others(start):
    executor = PacedExecutor(by_state)
    engine = start(executor, max_running=2)
    running = [request_of(BOS, number, **ENDLESS) for number in (3, 4)]
    waiting = long_requests(3)
    executor.trouble = lambda plan: RuntimeError("a bug") if len(executor.plans) == 3 else None
    first, second, *tickets = submit_together(engine, executor, [*running, *waiting])
    executor.let_run()
    for ticket in (first, second):
        with pytest.raises(RuntimeError, match="a bug"):
            events_of(ticket)
    assert_served(engine, tickets, waiting)
