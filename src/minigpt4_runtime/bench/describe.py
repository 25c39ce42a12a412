"""The whole job: a folder of pictures, described many at once, as it grows.

Owns   how many of the pictures are described at each point, and what one of them then costs.
Takes  a model and pictures; gives DescribePoints.
Never  lets one point find what another has computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4_runtime.bench.spread import Measured
from minigpt4_runtime.config import SamplingParams

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4


@dataclass(frozen=True, kw_only=True)
class DescribePoint:
    """So many pictures in one go; medians of the tries.

    Pictures that could not be read count in `num_failed`, and not in the rates.
    """

    num_images: int
    num_failed: int
    seconds: float
    images_per_second: float
    tokens_per_second: float
    ms_per_image: float | None
    tokens_per_image: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Described(Measured[DescribePoint]):
    """A measured folder, and why pictures of it failed."""

    failures: Mapping[str, str] = field(default_factory=dict)

    def as_text(self) -> str:
        """One line."""
        count, rate = self.point.num_images, self.point.images_per_second
        noun = "picture" if count == 1 else "pictures"
        return f"{count} {noun}: {self.point.seconds:.2f} s, {rate:.2f}/s"


def folder_sizes(num_images: int) -> list[int]:
    """1, 2, 4 … and all of them."""
    return [2**power for power in range(num_images.bit_length()) if 2**power < num_images] + [
        num_images
    ]


def measure_describe(
    model: MiniGPT4,
    pictures: Sequence[Path],
    prompt: str,
    sampling: SamplingParams,
    *,
    repeats: int,
) -> Iterator[Described]:
    """Describe 1, 2, 4 … and all pictures; one is described before, to warm up."""
    list(model.describe_all(pictures[:1], prompt, sampling))
    for size in folder_sizes(len(pictures)):
        yield _measure(model, pictures[:size], prompt, sampling, repeats=repeats)


def _measure(
    model: MiniGPT4,
    pictures: Sequence[Path],
    prompt: str,
    sampling: SamplingParams,
    *,
    repeats: int,
) -> Described:
    """Describe all of `pictures`, a few times, each with an engine that has seen none of them."""
    model.probe.reset_peak_memory()
    seconds, failures, num_tokens = [], {}, 0
    for _ in range(repeats):
        model.probe.use_engine(model.engine_config)
        model.probe.synchronize()
        started = time.perf_counter()
        results = list(model.describe_all(pictures, prompt, sampling))
        seconds.append(time.perf_counter() - started)
        failures = {str(pictures[r.index]): str(r.error) for r in results if r.error}
        num_tokens = sum(r.reply.usage.completion_tokens for r in results if r.reply)
    took, num_described = statistics.median(seconds), len(pictures) - len(failures)
    point = DescribePoint(
        num_images=len(pictures),
        num_failed=len(failures),
        seconds=took,
        images_per_second=num_described / took,
        tokens_per_second=num_tokens / took,
        ms_per_image=1e3 * took / num_described if num_described else None,
        tokens_per_image=num_tokens / num_described if num_described else None,
        peak_memory_bytes=model.probe.peak_memory_bytes(),
    )
    return Described(point, {"seconds": seconds}, failures)
