"""What becomes of requests: each has its own answer, its own end and its own error."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
from fake_runner import (
    END,
    PLACEHOLDER,
    VOCABULARY,
    FakeRunner,
    SumWatch,
    answer_without_cache,
    likely_token,
    log_probability,
)

from minigpt4_runtime import PromptTooLongError, RequestError, SamplingParams
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine import engine as engine_module
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import ImageInput, Request

BOS = 1
BLOCK_SIZE = 4
PATIENCE = 20  # Seconds until what waits counts as hanging.
ENDLESS = {"max_new_tokens": 5000, "ignore_eos": True}
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no room"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
]


def after_last(piece, state):
    """Logits that prefer the id after the last one."""
    return torch.eye(VOCABULARY)[(piece.token_ids[-1] + 1) % VOCABULARY]


def by_state(piece, state):
    """Logits that depend on all tokens before, and prefer what the slow twin says."""
    logits = torch.tensor([log_probability(state, each) for each in range(VOCABULARY)])
    logits[likely_token(state)] += 4
    return logits


class Executor:
    """Keeps plans to their contract, and does wrong where a test asks for it."""

    num_encoded_images = 0

    def __init__(self, logits=after_last):
        self.plans = []
        self.pixels = {}  # All that it was ever given.
        self.trouble = lambda plan: None  # Gives the error that a plan comes to.
        self.overflowing = set()  # Ids of sequences.
        self._logits = logits
        self._memory = FakeRunner(BLOCK_SIZE)

    def execute(self, plan, pixels):
        self.plans.append(plan)
        self.pixels.update(pixels)
        if error := self.trouble(plan):
            self._memory.fail(plan)
            raise error
        states = self._memory.execute(plan)
        sampled = [piece for piece in plan.slices if piece.is_sampled]
        logits = torch.zeros(len(sampled), VOCABULARY)
        for row, piece, state in zip(logits, sampled, states, strict=True):
            row += self._logits(piece, state)
            if piece.sequence_id in self.overflowing:
                row[0] = float("nan")
        return logits

    def let_run(self):
        """Nothing holds it."""


class PacedExecutor(Executor):
    """Shows each plan to the test, and waits with it until the test says to go on."""

    def __init__(self, logits=after_last):
        super().__init__(logits)
        self._shown = SimpleQueue()
        self._permits = threading.Semaphore(0)
        self._is_paced = True

    def execute(self, plan, pixels):
        if self._is_paced:
            self._shown.put(plan)
            assert self._permits.acquire(timeout=PATIENCE), "nobody lets it go on"
        return super().execute(plan, pixels)

    def next_plan(self):
        return self._shown.get(timeout=PATIENCE)

    def go_on(self):
        self._permits.release()

    def let_run(self):
        self._is_paced = False
        self._permits.release()


@pytest.fixture
def start():
    """Makes engines; closes them, and checks that none of their blocks is lost."""
    started = []

    def start_engine(executor, *, num_blocks=100, max_context=400, **config):
        engine = Engine(
            executor,
            EngineConfig(block_size=BLOCK_SIZE, **config),
            num_blocks=num_blocks,
            max_context=max_context,
            bos_id=BOS,
            eos_id=END,
        )
        started.append((executor, engine))
        return engine

    yield start_engine
    for executor, engine in started:
        executor.let_run()
        engine.close()
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
        assert not engine._inboxes


def request_of(*token_ids, watch=None, **sampling):
    return Request(token_ids, (), SamplingParams(**sampling), watch)


def submit(engine, *token_ids, watch=None, **sampling):
    return engine.submit(request_of(*token_ids, watch=watch, **sampling), lambda event: event)


def events_of(ticket):
    """All that is still to come; it is an error to wait for ever."""

    async def read():
        return [event async for event in ticket]

    return asyncio.run(asyncio.wait_for(read(), PATIENCE))


def ids_of(ticket):
    return [event.token_id for event in events_of(ticket)]


def slow_twin(request):
    return answer_without_cache(request, request.sampling.max_new_tokens)


def submit_together(engine, executor, requests):
    """All that are not finished run together from the second step on."""
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request, lambda event: event))
        if len(tickets) == 1:
            executor.next_plan()
    return tickets


def wait_until_idle(engine):
    engine._thread.join(PATIENCE)
    assert not engine._thread.is_alive()


# --- one answer ---------------------------------------------------------------------------------


def test_it_ends_at_the_end_id(start):
    events = events_of(submit(start(Executor()), BOS, 9))
    assert [event.token_id for event in events] == [10, 0, 1, END]
    assert [event.finish_reason for event in events] == [None, None, None, "stop"]


def test_it_ends_at_the_asked_length_and_computes_nothing_more(start):
    executor = Executor()
    engine = start(executor)
    events = events_of(submit(engine, BOS, 3, max_new_tokens=2))
    assert [event.token_id for event in events] == [4, 5]
    assert events[-1].finish_reason == "length"
    wait_until_idle(engine)
    computed = [piece.token_ids for plan in executor.plans for piece in plan.slices]
    assert computed == [(BOS, 3), (4,)]


@pytest.mark.parametrize("limits", [{"max_context": 12}, {"num_blocks": 3}])
@pytest.mark.parametrize("num_prompt", [10, 11])
def test_it_ends_where_the_context_or_the_cache_ends(start, limits, num_prompt):
    events = events_of(submit(start(Executor(), **limits), *[BOS] * (num_prompt - 1), 3, **ENDLESS))
    assert len(events) == 12 - num_prompt
    assert events[-1].finish_reason == "length"


def test_the_end_id_can_be_ignored(start):
    events = events_of(submit(start(Executor()), BOS, ignore_eos=True, max_new_tokens=4))
    assert [event.token_id for event in events] == [END, 3, 4, 5]
    assert events[-1].finish_reason == "length"


def test_a_watch_ends_an_answer_and_is_left_as_it_was(start):
    engine, request = start(Executor()), request_of(BOS, 3, watch=SumWatch(15))
    for _ in range(2):
        events = events_of(engine.submit(request, lambda event: event))
        assert [event.token_id for event in events] == [4, 5, 6]
        assert events[-1].finish_reason == "stop"


def test_an_event_tells_the_logprobs_that_were_asked_for(start):
    events = events_of(submit(start(Executor()), BOS, 3, max_new_tokens=3, logprobs=1))
    assert [event.logprobs.top[0][0] for event in events] == [4, 5, 6]


def test_pictures_reach_the_runner_by_their_digest(start):
    executor = Executor()
    cat, dog = (ImageInput(torch.zeros(3, 2, 2), name, 1, 2) for name in ("cat", "dog"))
    engine, token_ids = start(executor), (BOS, PLACEHOLDER, PLACEHOLDER, 3)
    for picture in (cat, dog):
        request = Request(token_ids, (picture,), SamplingParams(max_new_tokens=2))
        assert ids_of(engine.submit(request, lambda event: event)) == [4, 5]
    assert executor.pixels == {"cat": cat.pixels, "dog": dog.pixels}
    parts = [part for plan in executor.plans for piece in plan.slices for part in piece.images]
    assert [(part.digest, part.num_rows) for part in parts] == [("cat", 2), ("dog", 2)]


def test_without_a_seed_every_answer_is_another(start):
    engine = start(Executor(lambda piece, state: torch.zeros(VOCABULARY)))

    def drawn(seed):
        return ids_of(submit(engine, BOS, 3, temperature=1.0, seed=seed, max_new_tokens=40,
                             ignore_eos=True))  # fmt: skip

    assert drawn(5) == drawn(5)
    assert drawn(None) != drawn(None)


def test_what_was_done_is_counted(start):
    engine = start(Executor())
    for _ in range(2):
        events_of(submit(engine, BOS, 1, 1, 1, 3, max_new_tokens=3))
    wait_until_idle(engine)
    stats = engine.stats()
    assert stats.num_steps == 6
    assert stats.num_computed_tokens == (5 + 1 + 1) + (1 + 1 + 1)
    assert stats.num_reused_tokens == BLOCK_SIZE
    assert stats.num_free_blocks == stats.num_blocks


# --- what is refused ----------------------------------------------------------------------------


def refusal(engine, kind, *token_ids, **sampling):
    """The error, which comes before any work."""
    with pytest.raises(kind) as seen:
        submit(engine, *token_ids, **sampling)
    assert engine._thread is None
    return seen.value


def test_a_prompt_that_fills_the_context_is_refused(start):
    error = refusal(start(Executor(), max_context=12), PromptTooLongError, *[BOS] * 12)
    assert (error.num_tokens, error.limit) == (12, 12)
    assert "12 tokens and the model's context holds 12" in str(error)


def test_a_prompt_that_fills_the_cache_is_refused(start):
    error = refusal(start(Executor(), num_blocks=2), PromptTooLongError, *[BOS] * 8)
    assert (error.num_tokens, error.limit) == (8, 2 * BLOCK_SIZE)
    assert "8 tokens and the engine's cache holds 8" in str(error)


def test_more_beams_than_may_run_are_refused(start):
    engine = start(Executor(), max_running=3)
    error = refusal(engine, RequestError, BOS, num_beams=4, max_new_tokens=5)
    assert "num_beams is 4, but only 3" in str(error)
    assert len(ids_of(submit(engine, BOS, num_beams=3, max_new_tokens=5, ignore_eos=True))) == 5


def test_beams_are_refused_that_could_come_to_lack_blocks(start):
    # A full block of the prompt is shared; each beam's own 2 + 4 tokens take two.
    search = {"num_beams": 3, "max_new_tokens": 5, "ignore_eos": True}
    error = refusal(start(Executor(), num_blocks=6), RequestError, *[BOS] * 6, **search)
    assert "3 beams on a prompt of 6 tokens takes 7 blocks of the cache, which has 6" in str(error)
    assert len(ids_of(submit(start(Executor(), num_blocks=7), *[BOS] * 6, **search))) == 5


# --- many answers -------------------------------------------------------------------------------


def random_requests(count, **sampling):
    chance = random.Random(0)
    pieces = ((3, 4), (5, 6, 7, 8, 9), (10,), (0, 0, 0))
    requests = []
    for _ in range(count):
        ids = [BOS, *(i for piece in chance.choices(pieces, k=3) for i in piece)]
        watch = SumWatch(9) if chance.random() < 0.3 else None
        max_new_tokens = chance.randint(1, 12)
        requests.append(request_of(*ids, watch=watch, max_new_tokens=max_new_tokens, **sampling))
    return requests


def test_all_get_their_own_answers_from_several_threads(start):
    engine = start(Executor(by_state), num_blocks=12, max_running=4, max_step_tokens=16)

    def answers(requests):
        return list(map(ids_of, [engine.submit(each, lambda event: event) for each in requests]))

    requests = random_requests(96)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answers, [requests[first::6] for first in range(6)]))
    assert together == [list(map(slow_twin, requests[first::6])) for first in range(6)]


def test_a_search_finds_among_others_what_it_finds_alone(start):
    alone, crowded = start(Executor(by_state)), start(Executor(by_state), num_blocks=30)
    requests = random_requests(10, num_beams=3) + random_requests(10)
    tickets = [crowded.submit(request, lambda event: event) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        assert events_of(ticket) == events_of(alone.submit(request, lambda event: event))


@pytest.mark.parametrize("leave", ["cancel", "drop"])
def test_who_leaves_frees_the_blocks_before_the_next_step(start, leave):
    executor = PacedExecutor()
    engine = start(executor)
    leaving, staying = submit_together(
        engine, executor, [request_of(BOS, 4, **ENDLESS), request_of(BOS, 3, max_new_tokens=9)]
    )
    executor.go_on()
    assert {piece.sequence_id for piece in executor.next_plan().slices} == {0, 1}
    assert engine.stats().num_running == 2
    if leave == "cancel":
        leaving.cancel()
    del leaving
    executor.go_on()
    (piece,) = executor.next_plan().slices
    assert piece.sequence_id == 1
    assert engine.stats().num_free_blocks == engine.stats().num_blocks - len(piece.blocks)
    executor.let_run()
    assert ids_of(staying) == [4, 5, 6, 7, 8, 9, 10, 0, 1]


def test_who_leaves_while_waiting_never_runs(start):
    executor = PacedExecutor()
    engine = start(executor, max_running=1)
    first, leaving, last = submit_together(
        engine, executor, [request_of(BOS, number, max_new_tokens=3) for number in (3, 4, 5)]
    )
    executor.go_on()
    executor.next_plan()
    assert engine.stats().num_waiting == 2
    leaving.cancel()
    executor.let_run()
    assert [ids_of(first), ids_of(leaving), ids_of(last)] == [[4, 5, 6], [], [6, 7, 8]]
    assert {piece.sequence_id for plan in executor.plans for piece in plan.slices} == {0, 2}


# --- errors -------------------------------------------------------------------------------------


def long_requests(count):
    """By state, all of them are answered at length."""
    return [request_of(BOS, number, max_new_tokens=9) for number in (7, 9, 10, 1)[:count]]


def num_sequences(plan):
    return len({piece.sequence_id for piece in plan.slices})


class FailingWatch:
    """Fails at the third token of an answer."""

    def __init__(self, num_seen=0):
        self._num_seen = num_seen

    def feed(self, token_id):
        self._num_seen += 1
        if self._num_seen == 3:
            raise ValueError("the watch is broken")
        return False

    def fork(self):
        return FailingWatch(self._num_seen)


def assert_served(engine, tickets, requests):
    """The answers are right, and after them the engine gives one more."""
    assert list(map(ids_of, tickets)) == list(map(slow_twin, requests))
    later = request_of(BOS, 10, max_new_tokens=5)
    assert ids_of(engine.submit(later, lambda event: event)) == slow_twin(later)


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

    def feed(self, token_id):
        return False

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


# --- the thread ---------------------------------------------------------------------------------


def test_closing_ends_all_with_an_error_and_refuses_what_comes_later(start):
    executor = PacedExecutor()
    engine = start(executor, max_running=1)
    requests = [request_of(BOS, number, **ENDLESS) for number in (3, 4)]
    running, waiting = submit_together(engine, executor, requests)
    executor.go_on()
    executor.next_plan()
    arrived = submit(engine, BOS, 5, **ENDLESS)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._is_closed:
        time.sleep(0)
    executor.let_run()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not engine._thread.is_alive()
    assert next(running).token_id == 4
    for ticket in (running, waiting, arrived):
        with pytest.raises(RequestError, match="closed before this answer ended"):
            events_of(ticket)
    with pytest.raises(RequestError, match="was closed"):
        submit(engine, BOS, 3)


def test_what_never_worked_can_be_closed(start):
    engine = start(Executor())
    engine.close()
    with pytest.raises(RequestError, match="was closed"):
        submit(engine, BOS, 3)


def test_the_thread_ends_when_idle_and_a_later_request_starts_another(start):
    engine = start(Executor())
    threads = []
    for _ in range(2):
        assert ids_of(submit(engine, BOS, 9)) == [10, 0, 1, END]
        threads.append(engine._thread)
        wait_until_idle(engine)
    assert threads[0] is not threads[1]


def test_a_thread_that_lingers_is_woken_by_a_request_and_by_closing(start, monkeypatch):
    monkeypatch.setattr(engine_module, "_LINGER_SECONDS", 2 * PATIENCE)
    engine = start(Executor())
    threads = set()
    for _ in range(3):
        assert ids_of(submit(engine, BOS, 9)) == [10, 0, 1, END]
        threads.add(engine._thread)
    assert len(threads) == 1
    engine.close()


def test_no_request_is_lost_while_the_thread_ends(start, monkeypatch):
    monkeypatch.setattr(engine_module, "_LINGER_SECONDS", 0)
    engine = start(Executor())

    def ask_often(_):
        return [ids_of(submit(engine, BOS, 10, max_new_tokens=1)) for _ in range(100)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask_often, range(2))) == [[[0]] * 100] * 2


PROGRAM = """
import threading
import torch
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import Request

class Executor:
    num_encoded_images = 0
    def execute(self, plan, pixels):
        return torch.zeros(sum(piece.is_sampled for piece in plan.slices), 5)

def submit(max_new_tokens):
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return engine.submit(Request((1, 3), (), sampling), lambda event: event)

config = EngineConfig(block_size=10**4, prefix_cache=False)
limits = {"num_blocks": 10**4, "max_context": 10**8}
engine = Engine(Executor(), config, **limits, bos_id=1, eos_id=2)
endless = submit(10**8)
"""
AT_ONCE = """
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(next(endless).token_id)
"""
WITH_A_READER_LEFT = """
def read():
    threading.main_thread().join()
    print(len(list(submit(50))))

threading.Thread(target=read).start()
"""


@pytest.mark.parametrize(
    ("ending", "output"),
    [
        pytest.param(AT_ONCE, "0", id="at once"),
        pytest.param(WITH_A_READER_LEFT, "50", id="with a reader left"),
    ],
)
def test_a_program_ends_though_an_answer_goes_on(ending, output):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending],
        capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (finished.stdout.strip(), finished.stderr, finished.returncode) == (output, "", 0)
