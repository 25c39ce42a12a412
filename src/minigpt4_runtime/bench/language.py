"""The speed of the language model: batches of prompts of one length and answers of one length.

Owns   the prompts, which are random ids, first and later tokens, and the search for a batch size.
Takes  a model and Works; gives a LanguagePoint for each. Nothing is cached between two tries.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from math import inf
from typing import Any

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.costs import step_bytes
from minigpt4_runtime.bench.machine import GIB, available_memory_bytes
from minigpt4_runtime.bench.ramp_up import BatchVerdict, RampUp, find_largest_batch
from minigpt4_runtime.bench.spread import Measured, Spread
from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError, RequestError

DEFAULT_PAIRS = ((256, 64), (512, 128), (1024, 256), (3584, 512))
_WARM_UP_TOKENS = 4
_WIDEST_STEP = 8192
_SAFE_SHARE = 0.9  # Of the available memory: a machine swaps before all of it is taken.
_FIRST_ID = 3  # Smaller ids are control tokens.


@dataclass(frozen=True)
class Work:
    """The number of answers in a batch, and the tokens of each prompt and of each answer."""

    batch_size: int
    input_length: int
    output_length: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.input_length} + {self.output_length} tokens"

    @property
    def step_tokens(self) -> int:
        """A step's token budget that reads all prompts within half the length of the answers.

        With a smaller budget, the first answers would end before the last prompts are read. For
        very short answers the budget is limited.
        """
        in_steps = -(-self.batch_size * self.input_length // max(1, self.output_length // 2))
        wanted = max(EngineConfig.max_step_tokens, self.batch_size + in_steps)
        return min(wanted, self.batch_size + _WIDEST_STEP)

    def engine_config(self) -> EngineConfig:
        """Blocks for exactly these answers, without a prefix cache."""
        tokens = self.input_length + self.output_length
        blocks = -(-tokens // EngineConfig.block_size) + 1
        return EngineConfig(
            max_running=self.batch_size,
            max_step_tokens=self.step_tokens,
            num_blocks=self.batch_size * blocks,
            prefix_cache=False,
        )

    def prompts(self, vocab_size: int, attempt: int) -> list[list[int]]:
        """Random ids, different for each attempt."""
        rng = random.Random(f"{self}/{attempt}")
        return [
            [rng.randrange(_FIRST_ID, vocab_size) for _ in range(self.input_length)]
            for _ in range(self.batch_size)
        ]


@dataclass(frozen=True)
class AnswerTimes:
    """When each token of each answer arrived, on perf_counter's clock."""

    started: float
    times: Sequence[Sequence[float]]

    @property
    def response_time_ms(self) -> float:
        """From the start to the last token of the last answer."""
        return 1e3 * (max(times[-1] for times in self.times) - self.started)

    @property
    def first_token_ms(self) -> float:
        """The mean time from the start to an answer's first token."""
        return 1e3 * (statistics.fmean(times[0] for times in self.times) - self.started)

    @property
    def later_tokens_ms(self) -> list[float]:
        """The time of each later token while all answers were growing, so without prompts.

        If the answers never grow at the same time, all their later tokens count.
        """
        steps = [step for times in self.times for step in pairwise(times)]
        start = max(times[0] for times in self.times)
        end = min(times[-1] for times in self.times)
        together = [(a, b) for a, b in steps if start < (a + b) / 2 < end]
        return [1e3 * (b - a) for a, b in together or steps]


@dataclass(frozen=True, kw_only=True)
class LanguagePoint:
    """One measured Work, or why it failed. Its fields are the columns of the CSV.

    Response and first-token times are medians of the tries; later tokens are taken from all tries.
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
    """A measured Work, and whether its later tokens meet a limit."""

    verdict: BatchVerdict = "holds"

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
    """A search for the largest batch, and its limit."""

    input_length: int
    output_length: int
    max_token_latency_ms: float
    found: RampUp[Tried]

    def as_mapping(self) -> dict[str, Any]:
        """As JSON can hold it; `tried` are the batch sizes in the order of the tries."""
        asked = {name: value for name, value in vars(self).items() if name != "found"}
        return asked | {**vars(self.found), "tried": list(self.found.tried)}

    def as_text(self) -> str:
        """The result in one sentence."""
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
    """The batch needs more memory than is available."""


class LanguageBench:
    """Measures Works on one model, each with a new engine."""

    def __init__(self, model: MiniGPT4, *, repeats: int) -> None:
        self._model = model
        self._repeats = repeats
        self._free_cache()
        self._ceilings = measure_ceilings(model.device, model.dtype)

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._model.config.language.context_length

    def fitting(
        self, asked: Sequence[tuple[int, int]], notes: list[str]
    ) -> Sequence[tuple[int, int]]:
        """The pairs to measure: those asked for, or else the default ones that fit.

        `notes` get a sentence for each pair that is left out.

        Raises:
            ConfigError: a pair that is asked for does not fit into the model's context, or none do.
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
        """Find the largest batch whose mean time for a later token is within the limit.

        `pair` is input and output length, `sizes` the smallest and the largest batch. `on_tried`
        is called with each size that was measured.
        """

        def attempt(batch_size: int) -> Tried:
            work = Work(batch_size, *pair)
            tried = self.measure(work, max_token_latency_ms=max_token_latency_ms)
            on_tried(tried)
            return tried

        return BatchSearch(*pair, max_token_latency_ms, find_largest_batch(attempt, *sizes))

    def measure(self, work: Work, *, max_token_latency_ms: float = inf) -> Tried:
        """Measure a few times. Running out of memory gives a point with a failure, not an error."""
        try:
            self._make_room(work)
            self._run(replace(work, output_length=min(_WARM_UP_TOKENS, work.output_length)), -1)
            self._model.probe.reset_peak_memory()
            answered = [self._run(work, attempt) for attempt in range(self._repeats)]
        except OutOfMemoryError as error:
            return Tried(LanguagePoint(**asdict(work), failure=f"{work}: {error}."), {}, "memory")
        point = self._summarise(work, answered)
        is_slow = (point.per_token_ms or 0.0) > max_token_latency_ms
        tries = {
            "response_time_ms": [each.response_time_ms for each in answered],
            "first_token_ms": [each.first_token_ms for each in answered],
        }
        if work.output_length > 1:
            tries["per_token_ms"] = [statistics.fmean(each.later_tokens_ms) for each in answered]
        return Tried(point, tries, "latency" if is_slow else "holds")

    def _make_room(self, work: Work) -> None:
        """Make an engine for this work, unless the machine would have to swap."""
        self._free_cache()
        if self._model.device == "cpu":
            tokens = work.batch_size * (work.input_length + work.output_length)
            needed = tokens * token_bytes(self._model.config.language, self._model.cache_dtype)
            # All ranks share one memory: each has its part of the cache, and a whole step.
            needed += self._model.tensor_parallel * step_bytes(
                self._model.config, num_tokens=work.step_tokens, num_answers=work.batch_size
            )
            # A container may have less memory than its machine.
            known = (available_memory_bytes(), self._model.probe.free_memory_bytes())
            available = min((each for each in known if each is not None), default=None)
            if available is not None and needed > _SAFE_SHARE * available:
                raise OutOfMemoryError(
                    f"out of memory: {needed / GIB:.1f} GiB for keys, values and a step, and "
                    f"{available / GIB:.1f} GiB are available"
                )
        try:
            self._model.probe.use_engine(work.engine_config())
        except BackendUnavailableError as error:
            raise OutOfMemoryError(f"out of memory: {error}") from None

    def _free_cache(self) -> None:
        """Reduce the cache to one block."""
        self._model.probe.use_engine(EngineConfig(num_blocks=1))

    def _run(self, work: Work, attempt: int) -> AnswerTimes:
        prompts = work.prompts(self._model.config.language.vocab_size, attempt)
        sampling = SamplingParams(ignore_eos=True, max_new_tokens=work.output_length)
        times: list[list[float]] = [[] for _ in prompts]
        self._model.probe.synchronize()
        started = time.perf_counter()
        # A token is on the CPU when it is reported: the device has finished its step.
        tickets = [
            self._model.probe.submit_tokens(prompt, sampling, on_token=partial(_note_time, own))
            for prompt, own in zip(prompts, times, strict=True)
        ]
        try:
            for _ in chain.from_iterable(tickets):
                pass
        except RequestError:
            self._refuse_preempted()
            raise
        self._refuse_preempted()
        return AnswerTimes(started, times)

    def _refuse_preempted(self) -> None:
        # There are blocks for all answers: only a device without memory makes the engine preempt.
        if self._model.stats().num_preempted:
            raise OutOfMemoryError(f"out of memory: {self._model.device} had none for a step")

    def _summarise(self, work: Work, answered: Sequence[AnswerTimes]) -> LanguagePoint:
        response_time_ms = statistics.median(each.response_time_ms for each in answered)
        point = LanguagePoint(
            **asdict(work),
            response_time_ms=response_time_ms,
            first_token_ms=statistics.median(each.first_token_ms for each in answered),
            tokens_per_second=work.batch_size * work.output_length / response_time_ms * 1e3,
            peak_memory_bytes=self._model.probe.peak_memory_bytes(),
        )
        later = [interval for each in answered for interval in each.later_tokens_ms]
        if not later:
            return point
        spread = Spread.of(later)
        bandwidth = self._step_gigabytes(work) / spread.mean * 1e3
        return replace(
            point,
            per_token_ms=spread.mean,
            per_token_p50_ms=spread.p50,
            per_token_p90_ms=spread.p90,
            per_token_p99_ms=spread.p99,
            decode_tokens_per_second=work.batch_size / spread.mean * 1e3,
            gigabytes_per_second=bandwidth,
            bandwidth_share=bandwidth / self._ceilings.gigabytes_per_second,
        )

    def _step_gigabytes(self, work: Work) -> float:
        """What a rank reads in a decode step when half of each answer is generated."""
        weights = self._model.probe.weight_bytes()
        context = work.input_length + work.output_length / 2
        cached = token_bytes(self._model.config.language, self._model.cache_dtype)
        cached //= self._model.tensor_parallel
        return (weights["layers"] + weights["head"] + work.batch_size * context * cached) / 1e9


def _note_time(times: list[float], _: int) -> None:
    times.append(time.perf_counter())
