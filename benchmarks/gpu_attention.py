"""The speed of attention over the cache, as measured in the part attention of benchmarks/gpu.py.

Owns   the measured steps, with keys and values of random numbers.
Takes  a Setting. In a dry run the steps are tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from gpu_results import Results, Setting, UnavailableError, as_graph, median_seconds

from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape, KeyValueCache
from minigpt4_runtime.config import CacheDTypeName, EngineConfig
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.kernels.contracts import SequenceRows, StepBatch
from minigpt4_runtime.kernels.registry import bind_attention

BLOCK_SIZE = EngineConfig.block_size
NUM_HEADS, HEAD_DIM = 32, 128  # Of a 7B.
READ_BYTES = 2**29  # So many are read in turn, of several layers, so that no cache holds them.
ROWS_AT_ONCE = 2**14  # Rows are rounded from float32.


@dataclass(frozen=True)
class Work:
    """A step: `batch` sequences of `num_tokens`, of which the last `num_rows` are new."""

    batch: int
    num_rows: int
    num_tokens: int
    cache_dtype: CacheDTypeName

    @property
    def name(self) -> str:
        """As in "attention, 64 × 1 of 4000, float16"."""
        return f"attention, {self.batch} × {self.num_rows} of {self.num_tokens}, {self.cache_dtype}"

    @property
    def gigaflops(self) -> float:
        """Of both products: each row sees the tokens up to its own."""
        first = self.num_tokens - self.num_rows + 1
        seen = self.batch * self.num_rows * (first + self.num_tokens) / 2
        return 4 * NUM_HEADS * HEAD_DIM * seen / 1e9


def works(*, is_dry: bool) -> list[Work]:
    """Decode of 1 and of 64, and prompts without and with a context."""
    if is_dry:
        return [Work(2, 1, 20, "float32"), Work(1, 8, 20, "float32")]
    return [
        Work(1, 1, 4000, "float16"), Work(64, 1, 4000, "float16"), Work(1, 1, 4000, "int8"),
        Work(64, 1, 4000, "int8"), Work(64, 1, 4000, "fp8"), Work(64, 1, 4000, "int4"),
        Work(1, 2048, 2048, "float16"), Work(1, 512, 16000, "float16"),
        Work(1, 512, 16000, "int8"),
    ]  # fmt: skip


def attention(setting: Setting, results: Results) -> None:
    """Of rows that decode the bytes read a second, of prompts the operations."""
    for work in works(is_dry=setting.is_dry):
        results.attempt(work.name, partial(measure, work, setting))


def measure(work: Work, setting: Setting) -> dict[str, object]:
    """The time of a layer. Both rates are given; which one is near its ceiling depends."""
    facts = open_device(str(setting.device)).facts
    if work.cache_dtype == "fp8" and not facts.has_float8:
        raise UnavailableError("this device has no 8-bit floats")
    num_blocks = -(-work.num_tokens // BLOCK_SIZE)
    layer_bytes = work.batch * num_blocks * layer_shape(1).block_bytes(work.cache_dtype)
    num_layers = 1 if setting.is_dry else -(-READ_BYTES // layer_bytes)
    cache = random_cache(work, num_layers, setting.device)
    attend = bind_attention(facts.attention, cache)(batch_of(work, setting.device))
    dtype = torch.float32 if setting.is_dry else torch.float16
    shape = (work.batch * work.num_rows, NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=setting.device).to(dtype) for _ in range(3))

    def attend_in_all() -> None:
        for layer in range(num_layers):
            attend(layer, q, k, v)

    run = as_graph(attend_in_all, setting)
    seconds = median_seconds(run, setting.device) / num_layers
    return {
        "is_decode": work.num_rows == 1, "microseconds": seconds * 1e6,
        "gigabytes_per_second": layer_bytes / seconds / 1e9,
        "teraflops_per_second": work.gigaflops / seconds / 1e3,
    }  # fmt: skip


def layer_shape(num_layers: int) -> CacheShape:
    """Of all measured caches."""
    return CacheShape(num_layers, NUM_HEADS, HEAD_DIM, BLOCK_SIZE)


def random_cache(work: Work, num_layers: int, device: torch.device) -> KeyValueCache:
    """Whose blocks all sequences fill, as the format writes them."""
    num_blocks = work.batch * -(-work.num_tokens // BLOCK_SIZE)
    num_slots = num_blocks * BLOCK_SIZE
    cache = CACHE_FORMATS[work.cache_dtype].create(
        layer_shape(num_layers), num_blocks, dtype=work.cache_dtype, device=device
    )
    for layer in range(num_layers):
        for first in range(0, num_slots, ROWS_AT_ONCE):
            slots = torch.arange(first, min(first + ROWS_AT_ONCE, num_slots), device=device)
            rows = torch.randn(2, len(slots), NUM_HEADS, HEAD_DIM, device=device)
            cache.write(layer, slots, *rows)
    return cache


def batch_of(work: Work, device: torch.device) -> StepBatch:
    """The blocks of each sequence stand in a row of the table."""
    num_blocks = -(-work.num_tokens // BLOCK_SIZE)
    rows, sequences = range(work.batch), torch.arange(work.batch, device=device)
    places = torch.arange(work.num_tokens - work.num_rows, work.num_tokens, device=device)
    return StepBatch(
        tuple(
            SequenceRows(row * work.num_rows, work.num_rows, work.num_tokens, row, row * num_blocks)
            for row in rows
        ),
        (sequences[:, None] * num_blocks * BLOCK_SIZE + places).flatten(),
        torch.full((work.batch,), work.num_tokens, device=device),
        sequences,
        torch.arange(work.batch * num_blocks, dtype=torch.int32, device=device).view(
            work.batch, -1
        ),
    )
