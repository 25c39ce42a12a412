"""Answers many requests at once, step by step.

Owns   the thread that steps, the requests in it, and the handling of their errors. Where the device
       runs ahead, a step is planned and launched before the ids of the step before are read.
Takes  Requests from any thread; gives Tickets.
Never  knows text: a request's watch reads it.
"""

from __future__ import annotations

import copy
import itertools
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.request import Request, TokenEvent
from minigpt4_runtime.engine.room import Room
from minigpt4_runtime.engine.runner import EncodeCount
from minigpt4_runtime.engine.sampler import Choices, Sampler
from minigpt4_runtime.engine.scheduler import NextTokens, Scheduler
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.engine.ticket import Inbox, Ticket
from minigpt4_runtime.errors import (
    MiniGPT4Error,
    RankLostError,
    RequestError,
)
from minigpt4_runtime.kernels.contracts import RowChoice

T = TypeVar("T")
# How long an idle thread waits for requests before it ends. Starting one takes less than a
# millisecond, and Python waits for this thread when it exits.
_LINGER_SECONDS = 0.05
# After running out of memory, one more request may run after each of so many calm steps.
CALM_STEPS = 200
_CLOSED = RequestError("The model was closed. Load it again.")
# The messages of a CPU's allocator, the CUDA driver and cuBLAS.
_OUT_OF_MEMORY = (
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class Executor(Protocol):
    """The part of a runner that the engine uses."""

    @property
    def encoded(self) -> EncodeCount:
        """The images encoded so far."""

    def execute(
        self, plan: StepPlan, pixels: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> Tensor:
        """Compute a step: (R, V) logits, a row for each sampled token.

        `choices` are those of the step before, if the plan needs them.
        """


@dataclass(frozen=True)
class _Launched:
    """A step that the device has been given, and what it chooses for each sequence, by its row."""

    plan: StepPlan
    placed: list[tuple[int, Sequence]]
    choices: Choices


@dataclass(frozen=True)
class EngineStats:
    """The counters of an engine since its start, and its present state."""

    num_steps: int
    num_computed_tokens: int
    num_reused_tokens: int
    num_encoded_images: int
    num_preempted: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    encode_seconds: float


class Engine:
    """Serves requests independently of each other: an error ends only its own request."""

    def __init__(  # noqa: PLR0913 - the properties of the device are apart.
        self,
        runner: Executor,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_context: int,
        bos_id: int,
        eos_id: int,
        has_float64: bool = True,
        runs_ahead: bool = False,
        choice: RowChoice | None = None,
    ) -> None:
        self._runner: Executor | None = runner  # None after close().
        self._encoded = runner.encoded
        self._config = config
        self.room = Room(config, num_blocks, max_context)
        self._scheduler = Scheduler(config, num_blocks=num_blocks, eos_id=eos_id)
        self._sampler = Sampler(
            bos_id=bos_id, eos_id=eos_id, has_float64=has_float64, runs_ahead=runs_ahead,
            choice=choice,
        )  # fmt: skip
        self._runs_ahead = runs_ahead
        self._unread: _Launched | None = None
        self._ids = itertools.count()
        self._inboxes: dict[int, Inbox] = {}
        self._arrived: list[tuple[Sequence, Inbox]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_working = False
        self._end: MiniGPT4Error | None = None  # Why the engine takes no more requests.
        self._num_steps = 0
        self._last_trouble = 0  # The step at which `max_running` last changed.
        self._num_computed_tokens = 0

    # --- for callers --------------------------------------------------------------------------

    def submit(self, request: Request, read: Callable[[TokenEvent], T | None]) -> Ticket[T]:
        """Let a request join. `read` is called in the thread that reads the ticket.

        Raises:
            RequestError: there is no room for the request, or the engine is closed.
        """
        room, seed, num_prompt = self.room, request.sampling.seed, len(request.token_ids)
        max_new_tokens = room.most_new_tokens(request)
        inbox = Inbox(_while_alive(self._is_in_own_thread))
        with self._changed:
            if self._end:
                raise copy.copy(self._end)  # A traceback of its own.
            sequence = Sequence(
                next(self._ids),
                request,
                seed=secrets.randbits(63) if seed is None else seed,
                max_new_tokens=max_new_tokens,
                scored_at_once=room.candidates_at_once(num_prompt, max_new_tokens),
            )
            self._arrived.append((sequence, inbox))
            self._changed.notify_all()
            if not self._is_working:
                self._is_working = True
                # No daemon: one killed inside torch at exit would crash the process.
                self._thread = _EngineThread(target=self._work, name="engine", daemon=False)
                self._thread.start()
        return Ticket(inbox, read)

    def _is_in_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def stats(self) -> EngineStats:
        """A look at the engine; exact while it rests."""
        scheduler = self._scheduler
        with self._changed:
            num_arrived = len(self._arrived)
        return EngineStats(
            self._num_steps, self._num_computed_tokens, scheduler.num_reused_tokens,
            self._encoded.num_images, scheduler.num_preempted, len(scheduler.running),
            len(scheduler.waiting) + num_arrived, self.room.num_blocks, scheduler.num_free_blocks,
            self._encoded.seconds,
        )  # fmt: skip

    def close(self) -> None:
        """End all requests with an error, and free the thread and the caches."""
        with self._changed:
            self._end = self._end or _CLOSED
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._runner = None

    # --- the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        """Step while there is work; end after `_LINGER_SECONDS` without any."""
        while True:
            with self._changed:
                if not (self._arrived or self._scheduler.has_work or self._end):
                    self._changed.wait(_LINGER_SECONDS)
                    if not (self._arrived or self._end):
                        self._is_working = False
                        return
                if self._end is None and _has_program_ended():
                    self._end = _CLOSED
                if self._end:
                    self._is_working = False
                    break
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a bug; readers must not wait forever.
                why = MiniGPT4Error(f"The engine failed ({error!r}). Load the model again.")
                with self._changed:
                    self._end = why
        self._take_arrivals()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._fail(sequence, self._end)
        # After a bug the scheduler may have lost sequences.
        for inbox in self._inboxes.values():
            inbox.put(self._end)
        self._inboxes.clear()

    def step(self) -> None:
        """Drop cancelled requests, admit new ones, advance every running sequence."""
        self._take_arrivals()
        self._drop_cancelled()
        try:
            self._advance()
        except Exception as error:  # noqa: BLE001 - readers must learn of any error.
            self._recover(error)

    def _advance(self) -> None:
        """Launch a step, if possible before the choices of the step before are read."""
        runner, before, ids = self._runner, self._unread, None
        assert runner is not None, "a closed engine takes no step"
        self._unread = None
        if before and self._scheduler.expect(before.placed):
            self._commit(before.plan)
            ids = before.choices.ids
        elif before:
            self._finish(before)
        if not self._scheduler.has_work:
            return
        plan = self._scheduler.plan()
        try:
            # Empty where all that runs gets its last id from the step before.
            logits = runner.execute(plan, self._pixels(), ids) if plan.slices else None
        finally:
            if before and ids is not None:
                self._extend(before.placed, before.choices.read())
        if logits is None:
            return
        # Chosen when the ids before are known: penalties and forms need them.
        placed = self._scheduler.sampled(plan)
        launched = _Launched(plan, placed, self._sampler.start(logits, placed))
        if self._runs_ahead and self._scheduler.has_work:
            self._unread = launched
        else:
            self._finish(launched)

    def _take_arrivals(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        for sequence, inbox in arrived:
            self._inboxes[sequence.id] = inbox
            self._scheduler.add(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if self._inboxes[sequence.id].is_cancelled:
                self._forget(sequence)

    def _pixels(self) -> dict[str, Tensor]:
        return {
            image.digest: image.pixels
            for sequence in self._scheduler.running
            for image in sequence.request.all_images
        }

    def _finish(self, launched: _Launched) -> None:
        """Wait for a step before it counts."""
        choices = launched.choices.read()
        self._commit(launched.plan)
        self._extend(launched.placed, choices)

    def _commit(self, plan: StepPlan) -> None:
        if num_tokens := self._scheduler.commit(plan):
            self._num_steps += 1
            self._num_computed_tokens += num_tokens
            self._allow_more()

    def _extend(
        self,
        placed: list[tuple[int, Sequence]],
        choices: Mapping[int, NextTokens | RequestError],
    ) -> None:
        """Let the sequences of a step grow by what they chose, but for those that are gone."""
        for _, sequence in placed:
            if sequence.id not in self._inboxes:
                continue
            try:
                choice = choices[sequence.id]
                if isinstance(choice, RequestError):
                    raise choice
                events = self._scheduler.extend(sequence, choice)
            except Exception as error:  # noqa: BLE001 - a watch is the caller's code.
                self._fail(sequence, error)
                continue
            inbox = self._inboxes[sequence.id]
            # First, so that its blocks are free when the end is read.
            if events and events[-1].finish_reason:
                self._forget(sequence)
            for event in events:
                inbox.put(event)

    def _allow_more(self) -> None:
        """Let one more request run after calm steps: memory may be free again."""
        is_calm = self._num_steps - self._last_trouble >= CALM_STEPS
        if is_calm and self._scheduler.max_running < self._config.max_running:
            self._scheduler.max_running += 1
            self._last_trouble = self._num_steps

    def _recover(self, error: Exception) -> None:
        """Run fewer requests after running out of memory; end the running ones for other errors."""
        if isinstance(error, RankLostError):
            with self._changed:
                # Without its traceback, which holds the runner: NCCL waits for its graphs to go.
                self._end = RankLostError(str(error))
            return
        running = self._scheduler.running
        self._scheduler.preempt_all()
        if is_out_of_memory(error) and len(running) > 1:
            self._scheduler.max_running = max(1, len(running) // 2)
            self._last_trouble = self._num_steps
            return
        if is_out_of_memory(error) and running:
            num_prompt = running[0].num_prompt
            error = RequestError(
                f"The device ran out of memory on a prompt of {num_prompt} tokens. Shorten the "
                "prompt, lower max_new_tokens, or load the model in a smaller dtype."
            )
        for sequence in running:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        inbox = self._inboxes[sequence.id]
        self._forget(sequence)
        inbox.put(error)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._inboxes[sequence.id]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory. Only torch's GPU allocator has an error class for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def _while_alive(ask: Callable[[], bool]) -> Callable[[], bool]:
    """The method without its object: a ticket must not keep a model alive."""
    method = weakref.WeakMethod(ask)
    return lambda: (known := method()) is not None and known()


class _EngineThread(threading.Thread):
    """The thread of an engine, told apart from those of the program."""


def _has_program_ended() -> bool:
    """Whether no threads run but engines and daemons: no ticket can be read any more."""
    if threading.main_thread().is_alive():
        return False
    return all(
        thread.daemon or isinstance(thread, _EngineThread) or not thread.is_alive()
        for thread in threading.enumerate()
    )
