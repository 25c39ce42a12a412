"""The whole job: the images of a folder, described many at once.

Owns   how many of the images each point describes, and the cost of one image.
Takes  a model and images; gives DescribePoints. Each try has an engine with empty caches.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.bench.spread import Measured
from minigpt4_runtime.config import SamplingParams


@dataclass(frozen=True, kw_only=True)
class DescribePoint:
    """A number of images described in one go; times are medians of the tries.

    Images that could not be read count in `num_failed`, and not in the rates.
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
class DescribedFolder(Measured[DescribePoint]):
    """A measured folder, and the reasons why images of it failed."""

    failures: Mapping[str, str] = field(default_factory=dict)

    def as_text(self) -> str:
        """One line."""
        count, rate = self.point.num_images, self.point.images_per_second
        noun = "picture" if count == 1 else "pictures"
        return f"{count} {noun}: {self.point.seconds:.2f} s, {rate:.2f}/s"


def folder_sizes(num_images: int) -> list[int]:
    """1, 2, 4 … and all of them."""
    return [2**power for power in range((num_images - 1).bit_length())] + [num_images]


def measure_describe(
    model: MiniGPT4,
    images: Sequence[Path],
    prompt: str,
    sampling: SamplingParams,
    *,
    repeats: int,
) -> Iterator[DescribedFolder]:
    """Describe 1, 2, 4 … and all images; one image is described first, to warm up."""
    list(model.describe_all(images[:1], prompt, sampling))
    for size in folder_sizes(len(images)):
        model.probe.reset_peak_memory()
        seconds, failures, num_tokens = [], {}, 0
        for _ in range(repeats):
            model.probe.use_engine(model.engine_config)
            model.probe.synchronize()
            started = time.perf_counter()
            results = list(model.describe_all(images[:size], prompt, sampling))
            seconds.append(time.perf_counter() - started)
            failures = {str(images[r.index]): str(r.error) for r in results if r.error}
            num_tokens = sum(r.reply.usage.completion_tokens for r in results if r.reply)
        took, num_described = statistics.median(seconds), size - len(failures)
        point = DescribePoint(
            num_images=size,
            num_failed=len(failures),
            seconds=took,
            images_per_second=num_described / took,
            tokens_per_second=num_tokens / took,
            ms_per_image=1e3 * took / num_described if num_described else None,
            tokens_per_image=num_tokens / num_described if num_described else None,
            peak_memory_bytes=model.probe.peak_memory_bytes(),
        )
        yield DescribedFolder(point, {"seconds": seconds}, failures)
