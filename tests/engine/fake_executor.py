"""Stands for the runner behind an engine: logits without a model, and trouble where wanted."""

import asyncio
import threading
from dataclasses import replace
from queue import SimpleQueue

import torch
from fake_runner import (
    VOCABULARY,
    FakeRunner,
    answer_without_cache,
    likely_token,
    log_probability,
)

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.engine.request import NoWatch, Request
from minigpt4_runtime.engine.runner import EncodeCount

BOS = 1
BLOCK_SIZE = 4
PATIENCE = 20  # Seconds until what waits counts as hanging.
ENDLESS = {"max_new_tokens": 5000, "ignore_eos": True}
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no room"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def after_last(piece, state):
    """Logits that prefer the id after the last one."""
    return torch.eye(VOCABULARY)[(piece.token_ids[-1] + 1) % VOCABULARY]


def by_state(piece, state):
    """Logits that depend on all tokens before, and prefer what the slow twin says."""
    logits = torch.tensor([log_probability(state, each) for each in range(VOCABULARY)])
    logits[likely_token(state)] += 4
    return logits


def with_ids(plan, choices):
    """A plan whose unknown ids are looked up, as a device does it."""
    return replace(
        plan,
        slices=tuple(
            each
            if each.choice is None
            else replace(each, token_ids=(int(choices[each.choice]),), choice=None)
            for each in plan.slices
        ),
    )


class Executor:
    """Keeps plans to their contract, and does wrong where a test asks for it."""

    encoded = EncodeCount()

    def __init__(self, logits=after_last):
        self.plans = []  # As they were given; `known` with all ids.
        self.known = []
        self.pixels = {}  # All that it was ever given.
        self.trouble = lambda plan: None  # Gives the error that a plan comes to.
        self.overflowing = set()  # Ids of sequences.
        self._logits = logits
        self._memory = FakeRunner(BLOCK_SIZE)

    def execute(self, plan, pixels, choices=None):
        self.plans.append(plan)
        plan = with_ids(plan, choices)
        self.known.append(plan)
        self.pixels.update(pixels)
        if error := self.trouble(plan):
            self._memory.fail(plan)
            raise error
        states = self._memory.execute(plan)
        sampled = [piece for piece in plan.slices for _ in range(piece.num_sampled)]
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

    def execute(self, plan, pixels, choices=None):
        if self._is_paced:
            self._shown.put(plan)
            assert self._permits.acquire(timeout=PATIENCE), "nobody lets it go on"
        return super().execute(plan, pixels, choices)

    def next_plan(self):
        return self._shown.get(timeout=PATIENCE)

    def go_on(self):
        self._permits.release()

    def let_run(self):
        self._is_paced = False
        self._permits.release()


def request_of(*token_ids, watch=None, **sampling):
    return Request(token_ids, (), SamplingParams(**sampling), watch or NoWatch())


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
