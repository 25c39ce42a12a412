"""Counts and times for Prometheus.

Owns   the registry, and the names of the metrics.
Takes  events of requests; asks the model for its own counts at each reading.
Never  uses a label that a client can choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minigpt4_runtime.messages import Reply

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All that is counted, in a registry of its own."""

    def __init__(self, model: MiniGPT4, num_taken: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "minigpt4_requests", "Requests by route and outcome.", ("route", "outcome"),
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "minigpt4_tokens", "Tokens of prompts and of answers.", ("kind",),
            registry=self._registry,
        )  # fmt: skip
        self._images = Counter(
            "minigpt4_images", "Pictures in requests; those not encoded were found in a cache.",
            registry=self._registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "minigpt4_time_to_first_token_seconds", "From the body's end to the first text.",
            buckets=_FIRST_TOKEN_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "minigpt4_time_per_token_seconds", "Between an answer's tokens, after the first text.",
            buckets=_TOKEN_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_EngineReadings(model, num_taken))

    def count_request(self, route: str, outcome: str) -> None:
        """A request has ended in one way or another."""
        self._requests.labels(route, outcome).inc()

    def count_images(self, number: int) -> None:
        """So many pictures were given."""
        self._images.inc(number)

    def first_text(self, seconds: float) -> None:
        """An answer has begun."""
        self._first_token.observe(seconds)

    def answered(self, reply: Reply, seconds_after_first: float) -> None:
        """An answer is whole."""
        self._tokens.labels("prompt").inc(reply.usage.prompt_tokens)
        self._tokens.labels("answer").inc(reply.usage.completion_tokens)
        if reply.usage.completion_tokens > 1:
            self._per_token.observe(seconds_after_first / (reply.usage.completion_tokens - 1))

    def as_text(self) -> bytes:
        """Everything, in Prometheus' text form."""
        return generate_latest(self._registry)


class _EngineReadings(Collector):
    """The engine's own counts, read at each request for metrics."""

    def __init__(self, model: MiniGPT4, num_taken: Callable[[], int]) -> None:
        self._model = model
        self._num_taken = num_taken

    def collect(self) -> Iterator[Metric]:
        """One look at the engine."""
        stats = self._model.stats()
        gauges = {
            "admitted": ("Answers let in: running, waiting or in preparation.", self._num_taken()),
            "running": ("Answers that grow.", stats.num_running),
            "queued": ("Answers that wait for room.", stats.num_waiting),
            "cache_blocks": ("Blocks of keys and values.", stats.num_blocks),
            "cache_blocks_used": (
                "Of these, blocks that answers hold.", stats.num_blocks - stats.num_free_blocks,
            ),
        }  # fmt: skip
        counters: dict[str, tuple[str, float]] = {
            "steps": ("Steps of the engine.", stats.num_steps),
            "computed_tokens": ("Tokens computed, of prompts and answers.",
                                stats.num_computed_tokens),
            "cached_tokens": ("Prompt tokens found in the prefix cache.", stats.num_reused_tokens),
            "encoded_images": ("Pictures encoded.", stats.num_encoded_images),
            "image_encode_seconds": ("Time taken to encode pictures.", stats.encode_seconds),
            "preemptions": ("Answers that were set back to make room.", stats.num_preempted),
        }  # fmt: skip
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"minigpt4_{name}", text, value=value)
        for name, (text, total) in counters.items():
            yield CounterMetricFamily(f"minigpt4_{name}", text, value=total)
