"""The speed of the image side: each stage, cold and warm, in batches.

Owns   the clock that times each stage, and what counts as cold.
Takes  a function for each runtime that loads a model; gives VisionPoints, one runtime at a time.
Never  holds two models at once: each one's peak of memory is measured alone.
"""

import gc
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.costs import vision_gigaflops
from minigpt4_runtime.bench.report import BenchRun
from minigpt4_runtime.bench.spread import Measured, Spread
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.errors import BackendUnavailableError


@dataclass(frozen=True, kw_only=True)
class VisionPoint:
    """One runtime and batch size. All times are for one image; stages are means.

    A cold point is the first image after loading, which took `load_ms`. `encode_ms` is tower and
    projection together, which a compiled graph does as one.
    """

    runtime: str
    batch_size: int
    start: Literal["cold", "warm"]
    latency_ms: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    images_per_second: float
    decode_ms: float
    preprocess_ms: float
    tower_ms: float | None
    projection_ms: float | None
    encode_ms: float
    gigaflops_per_second: float
    ceiling_share: float
    load_ms: float | None
    peak_memory_bytes: int | None

    def __str__(self) -> str:
        about = f"{self.runtime}, {self.start}, batch {self.batch_size}"
        return f"{about}: {self.latency_ms:.1f} ms for a picture"


class StageClock:
    """Adds up the time of each stage. It is called as each stage ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Count the time since the last call for `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


def measure_vision(
    runtime: str,
    load: Callable[[], MiniGPT4],
    images: Sequence[bytes | Path],
    *,
    batch_sizes: Sequence[int],
    repeats: int,
) -> Iterator[Measured[VisionPoint]]:
    """Measure one runtime: cold with one image, then warm with each batch size."""
    gc.collect()
    started = time.perf_counter()
    model = load()
    model.probe.synchronize()
    load_ms = 1e3 * (time.perf_counter() - started)
    model.probe.use_engine(EngineConfig(num_blocks=1))  # No cache is needed.
    model.probe.reset_peak_memory()
    cold = [_encode(model, images[:1])]
    yield _summarise(model, runtime, 1, cold, load_ms)
    for batch_size in batch_sizes:
        _encode(model, _batch(images, batch_size, 0))
        model.probe.reset_peak_memory()
        warm = [_encode(model, _batch(images, batch_size, repeat)) for repeat in range(repeats)]
        yield _summarise(model, runtime, batch_size, warm, None)


def measure_runtimes(
    run: BenchRun,
    runtimes: Mapping[str, Callable[[], MiniGPT4]],
    images: Sequence[bytes | Path],
    *,
    name: str,
    batch_sizes: Sequence[int],
    repeats: int,
) -> None:
    """Measure all runtimes in turn. If there are several, a missing one is left out and noted."""
    for runtime, load in runtimes.items():
        load_noted = partial(run.load, load, name=name)
        try:
            for measured in measure_vision(
                runtime, load_noted, images, batch_sizes=batch_sizes, repeats=repeats
            ):
                run.add(measured)
        except BackendUnavailableError as error:
            if len(runtimes) == 1:
                raise
            run.notes.append(f"Left out: {runtime}. {error}")


def _batch(images: Sequence[bytes | Path], batch_size: int, repeat: int) -> list[bytes | Path]:
    """The next images for each repeat; after the last image comes the first again."""
    first = repeat * batch_size
    return [images[index % len(images)] for index in range(first, first + batch_size)]


def _encode(model: MiniGPT4, batch: Sequence[bytes | Path]) -> dict[str, float]:
    """The seconds of each stage of a batch."""
    model.probe.synchronize()
    clock = StageClock()
    model.probe.embed_images(batch, at_once=len(batch), on_stage=clock)
    return clock.seconds


def _summarise(
    model: MiniGPT4,
    runtime: str,
    batch_size: int,
    tries: Sequence[dict[str, float]],
    load_ms: float | None,
) -> Measured[VisionPoint]:
    # Read before the ceilings are measured, which takes memory too.
    peak_memory_bytes = model.probe.peak_memory_bytes()
    ceiling = measure_ceilings(model.device, model.dtype).gigaflops_per_second
    times = [{stage: 1e3 * s / batch_size for stage, s in each.items()} for each in tries]
    latencies = [sum(each.values()) for each in times]
    stages = {stage: statistics.fmean(each[stage] for each in times) for stage in times[0]}
    encodings = [each.get("tower", 0.0) + each["projection"] for each in times]
    spread, encode_ms = Spread.of(latencies), statistics.fmean(encodings)
    gigaflops = vision_gigaflops(model.config) / encode_ms * 1e3
    point = VisionPoint(
        runtime=runtime,
        batch_size=batch_size,
        start="warm" if load_ms is None else "cold",
        latency_ms=spread.mean,
        latency_p50_ms=spread.p50,
        latency_p90_ms=spread.p90,
        latency_p99_ms=spread.p99,
        images_per_second=1e3 / spread.mean,
        decode_ms=stages["decode"],
        preprocess_ms=stages["preprocess"],
        tower_ms=stages.get("tower"),
        projection_ms=stages["projection"] if "tower" in stages else None,
        encode_ms=encode_ms,
        gigaflops_per_second=gigaflops,
        ceiling_share=gigaflops / ceiling,
        load_ms=load_ms,
        peak_memory_bytes=peak_memory_bytes,
    )
    return Measured(point, {"latency_ms": latencies, "encode_ms": encodings})


def made_up_photo() -> bytes:
    """A JPEG about as costly to decode as a photo: soft colours and some noise."""
    from PIL import Image

    random = numpy.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 16, 3), dtype=numpy.uint8)
    soft = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    grain = random.normal(0, 8, (480, 640, 3))
    levels = numpy.clip(numpy.asarray(soft) + grain, 0, 255).astype(numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=90)
    return file.getvalue()
