"""The time to turn and to cache new keys, as measured in the part attention of benchmarks/gpu.py.

Owns   the measured steps: as torch does it, and as one launch of Triton's kernel.
Takes  a Setting. In a dry run the steps are tiny, and there is no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from gpu_attention import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, layer_shape
from gpu_results import Results, Setting, UnavailableError, as_graph, median_seconds
from torch import Tensor

from minigpt4_runtime.cache.key_value import CACHE_FORMATS, KeyValueCache
from minigpt4_runtime.config import CacheDTypeName
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.presets import PRESETS

Write = Callable[[KeyValueCache, Tensor, tuple[Tensor, Tensor, Tensor], Rotation], object]


def writes(setting: Setting, results: Results) -> None:
    """A layer of a 7B: rows that decode, and a prompt."""
    formats: tuple[CacheDTypeName, ...] = ("float16", "int8", "int4", "fp8")
    ways: dict[str, Write] = {"torch": by_torch, "one launch": in_one_launch}
    for name, num_rows in product(formats, (2,) if setting.is_dry else (1, 64, 2048)):
        for way, write in ways.items():
            measure = partial(seconds_of, write, name, num_rows, setting)
            results.attempt(f"turn and cache, {num_rows} of {name}, {way}", measure)


def by_torch(
    cache: KeyValueCache, slots: Tensor, qkv: tuple[Tensor, Tensor, Tensor], rotation: Rotation
) -> object:
    """The slow twin."""
    q, k, v = qkv
    cache.write(0, slots, rotation(k), v)
    return rotation(q)


def in_one_launch(
    cache: KeyValueCache, slots: Tensor, qkv: tuple[Tensor, Tensor, Tensor], rotation: Rotation
) -> object:
    """As `triton` attention does it."""
    if slots.device.type != "cuda":
        raise UnavailableError("Triton's kernels need a GPU")
    from minigpt4_runtime.kernels.cache_write_triton import turn_and_write

    return turn_and_write(cache, 0, slots, *qkv, rotation)  # type: ignore[arg-type]


def seconds_of(
    write: Write, name: CacheDTypeName, num_rows: int, setting: Setting
) -> dict[str, float]:
    """Microseconds. What both have written is compared in tests/kernels."""
    facts = open_device(str(setting.device)).facts
    if name == "fp8" and not facts.has_float8 and not setting.is_dry:
        raise UnavailableError("this device has no 8-bit floats")
    dtype = torch.float32 if setting.is_dry else torch.float16
    num_blocks = -(-num_rows // BLOCK_SIZE)
    cache = CACHE_FORMATS[name].create(
        layer_shape(1), num_blocks, dtype=name, device=setting.device
    )
    shape = (num_rows, NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=setting.device).to(dtype) for _ in range(3))
    slots = torch.arange(num_rows, device=setting.device)
    rotation = Rotation(slots, PRESETS["vicuna-7b"].language, dtype)
    run = as_graph(lambda: write(cache, slots, (q, k, v), rotation), setting)
    return {"microseconds": 1e6 * median_seconds(run, setting.device)}
