"""The engine launches a step before it reads the last one's ids: the same answers, and no more."""

from dataclasses import replace

import pytest
from fake_executor import BOS, OUT_OF_MEMORY, Executor, by_state, ids_of, submit, wait_until_idle
from fake_runner import END
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import ENOUGH_STEPS, LOADS, blocks_needed

from minigpt4_runtime import MiniGPT4Error
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine import sampler
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.plan import UNKNOWN_ID

SETTINGS = st.sampled_from((
    {}, {}, {"repetition_penalty": 1.4, "min_new_tokens": 1}, {"temperature": 0.8, "seed": 5},
    {"temperature": 1.2, "seed": 6, "top_k": 3, "presence_penalty": 0.7}, {"logprobs": 2},
))  # fmt: skip


class Steps:
    """An engine without its thread: a test takes each step."""

    def __init__(self, load, requests, *, runs_ahead):
        most = max(blocks_needed(request, load.block_size) for request in requests)
        config = EngineConfig(
            block_size=load.block_size,
            max_running=load.max_running,
            max_step_tokens=load.max_running + load.spare_tokens,
            prefix_cache=load.prefix_cache,
        )
        self.executor = Executor(by_state)
        self.executor._memory._block_size = load.block_size
        num_blocks = most + 1 + load.spare_blocks
        self.engine = Engine(
            self.executor, config, num_blocks=num_blocks, max_context=1000, bos_id=BOS, eos_id=END,
            runs_ahead=runs_ahead,
        )  # fmt: skip
        self.engine._is_working = True
        self.tickets = []

    def submit(self, request):
        self.tickets.append(self.engine.submit(request, lambda event: event))

    def finish(self):
        for _ in range(ENOUGH_STEPS):
            if not (self.engine._scheduler.has_work or self.engine._arrived):
                stats = self.engine.stats()
                assert stats.num_free_blocks == stats.num_blocks
                assert self.engine._unread is None
                return [read(ticket) for ticket in self.tickets]
            self.engine.step()
        raise AssertionError("it comes to no end")


def read(ticket):
    """All events that have come, and whether the answer ended by itself."""
    events = []
    try:
        while (event := ticket.poll(lambda: None)) is not None:
            events.append(event)
    except MiniGPT4Error:
        return events, False
    return events, bool(events and events[-1].finish_reason)


def with_settings(request, chosen):
    if request.sampling.num_beams > 1:
        return request
    return replace(request, sampling=replace(request.sampling, **chosen))


@settings(max_examples=150, deadline=None)
@given(LOADS, st.lists(SETTINGS, min_size=8, max_size=8))
def test_answers_are_those_of_steps_in_turn(load, chosen):
    requests = list(map(with_settings, load.requests(), chosen))
    quiet = Steps(load, requests, runs_ahead=False)
    list(map(quiet.submit, requests))
    expected = quiet.finish()
    ahead = Steps(load, requests, runs_ahead=True)
    clock, due = 0, 0
    for number, (request, ask) in enumerate(zip(requests, load.asks, strict=True)):
        due += ask.steps_before
        while clock < due:
            step_with(ahead, load, clock)
            clock += 1
        ahead.submit(request)
        if ask.cancelled_after is not None and number:
            ahead.tickets[number - 1].cancel()
    for found, wanted in zip(ahead.finish(), expected, strict=True):
        events, has_ended = found
        assert events == (wanted[0] if has_ended else wanted[0][: len(events)])


def step_with(steps, load, clock):
    """A step; where the load has an accident and several run, the device has no memory for it."""
    num_running = len(steps.engine._scheduler.running)
    has_trouble = clock in load.accidents and num_running > 1
    steps.executor.trouble = lambda plan: OUT_OF_MEMORY[0] if has_trouble else None
    steps.engine.step()
    steps.executor.trouble = lambda plan: None


class SlowDevice(Executor):
    """Takes its time: what a step chooses is known when it is waited for. Notes what happens."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.log = []
        self._num_sampled = 0
        self.failing_read = None
        monkeypatch.setattr(sampler, "_fetch", self._fetch)

    def execute(self, plan, pixels, choices=None):
        self.log.append(f"launch {len(self.plans)}")
        return super().execute(plan, pixels, choices)

    def _fetch(self, numbers):
        number, self._num_sampled = self._num_sampled, self._num_sampled + 1

        def read():
            self.log.append(f"read {number}")
            if number == self.failing_read:
                raise OUT_OF_MEMORY[0]
            return numbers.tolist()

        return read


@pytest.mark.parametrize("start", ["ahead"], indirect=True)
def test_a_step_is_launched_before_the_last_one_is_read(start, monkeypatch):
    device = SlowDevice(monkeypatch)
    assert ids_of(submit(start(device), BOS, 3, max_new_tokens=4)) == [4, 5, 6, 7]
    assert device.log == [
        "launch 0", "launch 1", "read 0", "launch 2", "read 1", "launch 3", "read 2", "read 3",
    ]  # fmt: skip
    assert [piece.token_ids for plan in device.plans for piece in plan.slices] == [
        (BOS, 3), *[(UNKNOWN_ID,)] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize("start", ["ahead"], indirect=True)
def test_a_beam_search_is_read_before_its_next_step(start, monkeypatch):
    device = SlowDevice(monkeypatch)
    events = ids_of(submit(start(device), BOS, 3, num_beams=2, max_new_tokens=3, ignore_eos=True))
    assert len(events) == 3
    assert device.log == ["launch 0", "read 0", "launch 1", "read 1", "launch 2", "read 2"]


@pytest.mark.parametrize("start", ["ahead"], indirect=True)
def test_a_row_of_an_answer_that_had_ended_counts_for_nothing(start):
    executor = Executor()
    engine = start(executor)
    assert ids_of(submit(engine, BOS, 0)) == [1, END]
    wait_until_idle(engine)
    assert [piece.token_ids for plan in executor.known for piece in plan.slices] == [
        (BOS, 0), (1,), (END,),
    ]  # fmt: skip
    assert (engine.stats().num_steps, engine.stats().num_computed_tokens) == (2, 3)


@pytest.mark.parametrize("start", ["ahead"], indirect=True)
def test_choices_that_cannot_be_read_are_made_again(start, monkeypatch):
    device = SlowDevice(monkeypatch)
    device.failing_read = 3
    engine = start(device)
    tickets = [submit(engine, BOS, number, max_new_tokens=6) for number in (3, 4)]
    assert list(map(ids_of, tickets)) == [[4, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]
    assert engine.stats().num_preempted == 2
