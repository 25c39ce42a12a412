"""Parts of benchmarks/gpu.py about a whole model: quantised, start. And the choice of ids.

Owns   decode with quantised weights, the loading of a folder, and the choice of a step's ids.
Takes  a Setting. In a dry run the shapes are tiny.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from engine import Work
from gpu_results import Results, Setting, UnavailableError, as_graph, median_seconds
from gpu_speed import as_loaded, language_works, rates
from rivals import Ours, wide_config
from torch import Tensor

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint import reading
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.load import load_language
from minigpt4_runtime.checkpoint.reading import NUM_THREADS
from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine.drawing import TORCH_CHOICE
from minigpt4_runtime.kernels.contracts import Lots, RowChoice
from minigpt4_runtime.kernels.registry import row_choice

FORMATS = ("w8a16", "w4a16-g128", "w8a8-fp8", "w8a8")
VOCAB_SIZE = 32_000
_LAYERS = 4  # Of the folder that is loaded: 2.1 GB.
_LINK_BYTES = 2**30
OTHER_THREADS = (8, 16)


# --- quantised ------------------------------------------------------------------------------------


def quantised(setting: Setting, results: Results) -> None:
    """Decode of 1 and of 64 answers, as in the part language, without transformers.

    One answer comes first in all formats: should time run out, each has been read once.
    """
    facts = open_device(str(setting.device)).facts
    works = [work for work in language_works(is_dry=setting.is_dry) if work.is_decode]
    formats = FORMATS[:1] if setting.is_dry else FORMATS
    for work, name in product((works[0], works[-1]), formats):
        if name.endswith("fp8") and not facts.has_float8:
            results.add(f"{work.name}, {name}", unavailable="this device has no 8-bit floats")
        else:
            results.attempt(f"{work.name}, {name}", partial(decode_in, name, work, setting))


def decode_in(name: str, work: Work, setting: Setting) -> dict[str, object]:
    """The rates of a work in a format, by a model of its own: one at a time is in memory."""
    dtype: DTypeName = "float32" if setting.is_dry else "float16"
    ours = Ours(
        load_config(DEMO_MODEL_DIR) if setting.is_dry else wide_config(32),
        device=str(setting.device), dtype=dtype, num_blocks=64 if setting.is_dry else 1800,
        formats={"language.layers": name, "language.head": name},
    )  # fmt: skip
    try:
        return rates(work, ours.generate, ours, setting)
    finally:
        ours.close()
        del ours
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


# --- start ----------------------------------------------------------------------------------------


def start(setting: Setting, results: Results) -> None:
    """A folder into the device's memory, beside the rates of link and file."""
    from load_memory import TOKENIZER

    config = load_config(DEMO_MODEL_DIR) if setting.is_dry else wide_config(_LAYERS)
    results.attempt("link", partial(link_rate, setting))
    with tempfile.TemporaryDirectory() as work_dir:
        folder = Path(work_dir, "model")
        weights = DeviceWeights(model_shapes(config), setting.device)
        write_folder(folder, config, weights, TOKENIZER, dtype="float16")
        for count in (NUM_THREADS,) if setting.is_dry else (NUM_THREADS, *OTHER_THREADS):
            which = "" if count == NUM_THREADS else f", {count} threads"
            results.attempt(f"file{which}", partial(file_rate, folder, count))
            with mock.patch.object(reading, "NUM_THREADS", count):
                results.attempt(f"load{which}", partial(load_rate, folder, setting))


class DeviceWeights(Mapping[str, Tensor]):
    """Random weights, drawn on the device one at a time: a host's generator takes a minute."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device

    def __getitem__(self, name: str) -> Tensor:
        return (torch.randn(self._shapes[name], device=self._device) / 50).half().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def link_rate(setting: Setting) -> dict[str, float]:
    """From pinned memory to the device."""
    size, is_far = (2**20 if setting.is_dry else _LINK_BYTES), setting.device.type != "cpu"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=is_far)
    there = torch.empty_like(host, device=setting.device)
    seconds = median_seconds(lambda: there.copy_(host, non_blocking=True), setting.device)
    return {"gigabytes_per_second": size / seconds / 1e9}


def file_rate(folder: Path, num_threads: int) -> dict[str, float]:
    """Its files read by so many threads. They were just written: maybe from memory."""
    shares = list(product(folder.glob("*.safetensors"), range(num_threads), [num_threads]))
    started = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        count = sum(pool.map(read_share, *zip(*shares, strict=True)))
    return {"gigabytes_per_second": count / (time.perf_counter() - started) / 1e9}


def read_share(path: Path, number: int, num_threads: int) -> int:
    """Read a thread's share of a file; its bytes."""
    size, view = path.stat().st_size, memoryview(bytearray(2**22))
    first, end = (size * each // num_threads for each in (number, number + 1))
    with path.open("rb", buffering=0) as file:
        file.seek(first)
        at = first
        while at < end:
            at += file.readinto(view[: end - at]) or 0
    return end - first


def load_rate(folder: Path, setting: Setting) -> dict[str, float]:
    """The language model as `MiniGPT4.load` loads it; the faster of two, the first one warms up."""
    dtype, times = torch.float32 if setting.is_dry else torch.float16, []
    where = as_loaded(open_device(str(setting.device)), dtype)
    for _ in range(2):
        started = time.perf_counter()
        language = load_language(folder, **where)
        setting.synchronize()
        times.append(time.perf_counter() - started)
        count = sum(weight.numel() for weight in language.parameters())
        del language
    return {"gigabytes_per_second": 2 * count / min(times) / 1e9}


# --- the choice of ids ----------------------------------------------------------------------------


def choices(setting: Setting, results: Results) -> None:
    """The best ids of a step, and drawn ones: by torch, and in one launch."""
    settings = {"best": None, "drawn": {}, "drawn, top-p": {"top_p": 0.9}}
    for (what, asked), count in product(settings.items(), (2,) if setting.is_dry else (1, 64)):
        for way in ("torch", "one launch"):
            measure = partial(choose, setting, way, asked, count)
            results.attempt(f"ids, {count} {what}, {way}", measure)


def choose(
    setting: Setting, way: str, asked: Mapping[str, float] | None, count: int
) -> dict[str, float]:
    """Microseconds, the host's work included where that is longer: a draw is not captured."""
    choice: RowChoice | None = TORCH_CHOICE if way == "torch" else row_choice(setting.device)
    if choice is None:
        raise UnavailableError("Triton's kernels need a GPU")
    logits = 3 * torch.randn(count, 100 if setting.is_dry else VOCAB_SIZE, device=setting.device)
    work: Callable[[], object] = partial(choice.best, logits)
    if asked is None:
        work = as_graph(work, setting)
    else:
        params = SamplingParams(temperature=1.0, **asked)  # type: ignore[arg-type]
        work = partial(choice.draw, logits, Lots((params,) * count, tuple(range(count))))
    return {"microseconds": 1e6 * median_seconds(work, setting.device)}
