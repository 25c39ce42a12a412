"""How fast answers grow: so many at once, from prompts of one length, each of one length.

Owns   what is asked, what counts as first and as later tokens, and when memory is too small.
Takes  a model and Works; gives a LanguagePoint for each.
Never  uses a picture or a text: prompts are random ids, and nothing is kept between two tries.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.costs import step_bytes
from minigpt4_runtime.bench.machine import GIB, available_memory_bytes
from minigpt4_runtime.bench.ramp_up import RampUp, Verdict, find_largest_batch
from minigpt4_runtime.bench.spread import Measured, Spread
from minigpt4_runtime.cache.key_value import token_bytes
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError, RequestError

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

DEFAULT_PAIRS = ((256, 64), (512, 128), (1024, 256), (3584, 512))
_WARM_UP_TOKENS = 4
_WIDEST_STEP = 8192
_SAFE_SHARE = 0.9  # Of the memory that is available: a machine swaps before all of it is taken.
_FIRST_ID = 3  # Below it are the control ids.


@dataclass(frozen=True)
class Work:
    """So many answers at once, and the tokens of each prompt and of each answer."""

    batch_size: int
    input_length: int
    output_length: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.input_length} + {self.output_length} tokens"

    @property
    def step_tokens(self) -> int:
        """A step's budget with which all answers grow together for half of their length.

        With a smaller one, the last prompts would still be read when the first answers are done.
        Very short answers would take a step so wide that it is held to a limit instead.
        """
        in_steps = -(-self.batch_size * self.input_length // max(1, self.output_length // 2))
        wanted = max(EngineConfig.max_step_tokens, self.batch_size + in_steps)
        return min(wanted, self.batch_size + _WIDEST_STEP)

    def engine_config(self) -> EngineConfig:
        """Room for exactly these answers, and nothing that is found again."""
        tokens = self.input_length + self.output_length
        blocks = -(-tokens // EngineConfig.block_size) + 1
        return EngineConfig(
            max_running=self.batch_size,
            max_step_tokens=self.step_tokens,
            num_blocks=self.batch_size * blocks,
            prefix_cache=False,
        )

    def prompts(self, vocab_size: int, attempt: int) -> list[list[int]]:
        """Random ids, others for each attempt."""
        rng = random.Random(f"{self}/{attempt}")
        return [
            [rng.randrange(_FIRST_ID, vocab_size) for _ in range(self.input_length)]
            for _ in range(self.batch_size)
        ]


@dataclass(frozen=True)
class Answered:
    """When each token of each answer came, on perf_counter's clock."""

    started: float
    times: Sequence[Sequence[float]]

    @property
    def response_time_ms(self) -> float:
        """From the asking to the last token of all."""
        return 1e3 * (max(times[-1] for times in self.times) - self.started)

    @property
    def first_token_ms(self) -> float:
        """From the asking to an answer's first token, in the mean of all answers."""
        return 1e3 * (statistics.fmean(times[0] for times in self.times) - self.started)

    @property
    def later_tokens_ms(self) -> list[float]:
        """How long each later token took, while all answers grew: prompts are not in it.

        Answers too short to grow together count whole.
        """
        steps = [step for times in self.times for step in pairwise(times)]
        start = max(times[0] for times in self.times)
        end = min(times[-1] for times in self.times)
        together = [(a, b) for a, b in steps if start < (a + b) / 2 < end]
        return [1e3 * (b - a) for a, b in together or steps]


@dataclass(frozen=True, kw_only=True)
class LanguagePoint:
    """One Work, measured; or why it could not be. Its fields are the columns of the CSV.

    Response and first-token times are medians of the tries; later tokens are those of all tries.
    """

    batch_size: int
    input_length: int
    output_length: int
    response_time_ms: float | None = None
    first_token_ms: float | None = None
    per_token_ms: float | None = None
    tokens_per_second: float | None = None
    per_token_p50_ms: float | None = None
    per_token_p90_ms: float | None = None
    per_token_p99_ms: float | None = None
    decode_tokens_per_second: float | None = None
    gigabytes_per_second: float | None = None
    bandwidth_share: float | None = None
    peak_memory_bytes: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Tried(Measured[LanguagePoint]):
    """A measured Work, and how it stands to a limit on its later tokens."""

    verdict: Verdict = "holds"

    def as_text(self) -> str:
        """One line."""
        point = self.point
        work = Work(point.batch_size, point.input_length, point.output_length)
        if point.failure is not None:
            return point.failure
        later = f", {point.per_token_ms:.2f} ms for a later token" if point.per_token_ms else ""
        return f"{work}: {point.response_time_ms:.0f} ms{later}"


_LIMITS = {
    "range": "larger ones were not asked for",
    "latency": "the next larger one is too slow",
    "memory": "the next larger one is out of memory",
}


@dataclass(frozen=True)
class BatchSearch:
    """A search for the largest batch, and what it was held to."""

    input_length: int
    output_length: int
    max_token_latency_ms: float
    found: RampUp[Tried]

    def as_mapping(self) -> dict[str, Any]:
        """As JSON can hold it: `tried` are the batch sizes in the order in which they came."""
        return {
            "input_length": self.input_length,
            "output_length": self.output_length,
            "max_token_latency_ms": self.max_token_latency_ms,
            "batch_size": self.found.batch_size,
            "limit": self.found.limit,
            "tried": list(self.found.tried),
        }

    def as_text(self) -> str:
        """What came of it, in one sentence."""
        found, limit = self.found, f"{self.max_token_latency_ms:g} ms for a later token"
        about = f"{self.input_length} + {self.output_length} tokens, at most {limit}"
        if found.batch_size is None:
            why = "is out of memory" if found.limit == "memory" else "is too slow"
            return f"{about}: no batch holds; already {min(found.tried)} {why}."
        return (
            f"{about}: the largest batch is {found.batch_size}; {_LIMITS[found.limit]} "
            f"({len(found.tried)} sizes tried)."
        )


class OutOfMemoryError(Exception):
    """So many answers take more memory than there is."""


class LanguageBench:
    """Measures Works on one model, each in an engine of its own."""

    def __init__(self, model: MiniGPT4, *, repeats: int) -> None:
        self._model = model
        self._repeats = repeats
        self._let_go()
        self._ceilings = measure_ceilings(model.device, model.dtype)

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._model.config.language.max_position_embeddings

    def fitting(
        self, asked: Sequence[tuple[int, int]], notes: list[str]
    ) -> Sequence[tuple[int, int]]:
        """The pairs to measure: those that are asked for, or the default ones that fit, and a note.

        Raises:
            ConfigError: one that is asked for does not fit into the model's context, or none does.
        """
        context, pairs = self.context, asked or DEFAULT_PAIRS
        faults = [
            f"{prompt} + {answer} tokens do not fit into the model's context of {context}"
            for prompt, answer in pairs
            if prompt + answer > context
        ]
        if asked and faults:
            raise ConfigError(f"--pair: {faults[0]}. Give a shorter one.")
        if len(faults) == len(pairs):
            raise ConfigError(f"The model's context holds {context} tokens. Give a shorter --pair.")
        notes += [f"Left out: {fault}." for fault in faults]
        return [pair for pair in pairs if sum(pair) <= context]

    def search(
        self,
        pair: tuple[int, int],
        sizes: tuple[int, int],
        *,
        max_token_latency_ms: float,
        on_tried: Callable[[Tried], object],
    ) -> BatchSearch:
        """Find the largest batch whose later tokens come fast enough in the mean.

        `pair` is input and output length, `sizes` the smallest and the largest batch. `on_tried`
        hears of each size as it is measured.
        """

        def attempt(batch_size: int) -> Tried:
            work = Work(batch_size, *pair)
            tried = self.measure(work, max_token_latency_ms=max_token_latency_ms)
            on_tried(tried)
            return tried

        return BatchSearch(*pair, max_token_latency_ms, find_largest_batch(attempt, *sizes))

    def measure(self, work: Work, *, max_token_latency_ms: float | None = None) -> Tried:
        """Ask a few times. Too little memory is a point too, not an error."""
        try:
            self._make_room(work)
            self._ask(replace(work, output_length=min(_WARM_UP_TOKENS, work.output_length)), -1)
            self._model.probe.reset_peak_memory()
            answered = [self._ask(work, attempt) for attempt in range(self._repeats)]
        except OutOfMemoryError as error:
            return Tried(LanguagePoint(**asdict(work), failure=f"{work}: {error}."), {}, "memory")
        point = self._summarise(work, answered)
        limit = max_token_latency_ms
        is_slow = limit is not None and (point.per_token_ms or 0.0) > limit
        tries = {
            "response_time_ms": [each.response_time_ms for each in answered],
            "first_token_ms": [each.first_token_ms for each in answered],
        }
        if work.output_length > 1:
            tries["per_token_ms"] = [statistics.fmean(each.later_tokens_ms) for each in answered]
        return Tried(point, tries, "latency" if is_slow else "holds")

    def _make_room(self, work: Work) -> None:
        """Begin an engine for this work, unless the machine would have to swap for it."""
        self._let_go()
        if self._model.device == "cpu":
            tokens = work.batch_size * (work.input_length + work.output_length)
            needed = tokens * token_bytes(self._model.config.language, self._model.dtype)
            # All ranks take from one memory: each has its part of the cache, and a whole step.
            needed += self._model.tensor_parallel * step_bytes(
                self._model.config, num_tokens=work.step_tokens, num_answers=work.batch_size
            )
            available = self._available_bytes()
            if available is not None and needed > _SAFE_SHARE * available:
                raise OutOfMemoryError(
                    f"out of memory: {needed / GIB:.1f} GiB for keys, values and a step, and "
                    f"{available / GIB:.1f} GiB are available"
                )
        try:
            self._model.probe.use_engine(work.engine_config())
        except BackendUnavailableError as error:
            raise OutOfMemoryError(f"out of memory: {error}") from None

    def _available_bytes(self) -> int | None:
        """What can be had without swapping; a container may have less than its machine."""
        known = (available_memory_bytes(), self._model.probe.free_memory_bytes())
        return min((each for each in known if each is not None), default=None)

    def _let_go(self) -> None:
        """Leave of the last engine's cache but one block."""
        self._model.probe.use_engine(EngineConfig(num_blocks=1))

    def _ask(self, work: Work, attempt: int) -> Answered:
        prompts = work.prompts(self._model.config.language.vocab_size, attempt)
        sampling = SamplingParams(ignore_eos=True, max_new_tokens=work.output_length)
        times: list[list[float]] = [[] for _ in prompts]
        self._model.probe.synchronize()
        started = time.perf_counter()
        # A token is a number on the CPU when it is heard of: the device has done its step.
        tickets = [
            self._model.probe.submit_tokens(prompt, sampling, on_token=partial(_note_time, own))
            for prompt, own in zip(prompts, times, strict=True)
        ]
        try:
            for ticket in tickets:
                for _ in ticket:
                    pass
        except RequestError:
            self._refuse_preempted()
            raise
        self._refuse_preempted()
        return Answered(started, times)

    def _refuse_preempted(self) -> None:
        # There are blocks for all: only a device without memory makes the engine take some back.
        if self._model.stats().num_preempted:
            raise OutOfMemoryError(f"out of memory: {self._model.device} had none for a step")

    def _summarise(self, work: Work, answered: Sequence[Answered]) -> LanguagePoint:
        peak_memory_bytes = self._model.probe.peak_memory_bytes()
        response_time_ms = statistics.median(each.response_time_ms for each in answered)
        later = [interval for each in answered for interval in each.later_tokens_ms]
        spread = Spread.of(later) if later else None
        bandwidth = self._step_gigabytes(work) / spread.mean * 1e3 if spread else None
        ceiling = self._ceilings.gigabytes_per_second
        return LanguagePoint(
            **asdict(work),
            response_time_ms=response_time_ms,
            first_token_ms=statistics.median(each.first_token_ms for each in answered),
            per_token_ms=spread.mean if spread else None,
            tokens_per_second=work.batch_size * work.output_length / response_time_ms * 1e3,
            per_token_p50_ms=spread.p50 if spread else None,
            per_token_p90_ms=spread.p90 if spread else None,
            per_token_p99_ms=spread.p99 if spread else None,
            decode_tokens_per_second=work.batch_size / spread.mean * 1e3 if spread else None,
            gigabytes_per_second=bandwidth,
            bandwidth_share=bandwidth / ceiling if bandwidth else None,
            peak_memory_bytes=peak_memory_bytes,
        )

    def _step_gigabytes(self, work: Work) -> float:
        """What a rank reads in a step in which all answers grow, half of each being there."""
        weights = self._model.probe.weight_bytes()
        context = work.input_length + work.output_length / 2
        cached = token_bytes(self._model.config.language, self._model.dtype)
        cached //= self._model.tensor_parallel
        return (weights["layers"] + weights["head"] + work.batch_size * context * cached) / 1e9


def _note_time(times: list[float], _: int) -> None:
    times.append(time.perf_counter())
