"""The part of benchmarks/gpu.py that trains: whether 7B learns on a card of 12 GiB.

Owns   the cases, and a few steps of each.
Takes  a Setting. In a dry run the shape is the demo model's.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from gpu_results import Results, Setting
from tuning_memory import make_training

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.tune.settings import TuneSettings

LENGTH = 256  # A picture, a question and an answer of 64 ids.
NUM_STEPS = 6
# Weights of the layers, sequences at once, and whether layers are computed again.
CASES = (("w4a16-g128", 4, True), ("w4a16-g128", 1, False), ("float", 4, True))


def tuning(setting: Setting, results: Results) -> None:
    """Steps of LoRA of rank 16 and the projection: the peak of memory, and tokens per second."""
    for weights, at_once, recompute in CASES:
        name = f"{weights}, {at_once} × {LENGTH}{', recomputed' if recompute else ''}"
        settings = TuneSettings(
            batch_size=4, at_once=at_once, recompute=recompute, lora=16, warmup_steps=0
        )
        results.attempt(name, partial(train, weights, settings, setting))


def train(weights: str, settings: TuneSettings, setting: Setting) -> dict[str, float | None]:
    """A few steps of one case from its loading on. The first is not timed."""
    backend = open_device(str(setting.device))
    backend.reset_peak_memory()
    config = load_config(DEMO_MODEL_DIR) if setting.is_dry else PRESETS["vicuna-7b"]
    training = make_training(
        config, "w4a16-g32" if setting.is_dry and weights != "float" else weights, settings,
        length=64 if setting.is_dry else LENGTH, device=setting.device,
        dtype=torch.float32 if setting.is_dry else torch.bfloat16,
    )  # fmt: skip
    seconds = []
    for number in range(2 if setting.is_dry else NUM_STEPS):
        started = time.perf_counter()
        step = training.step(number)
        setting.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = backend.peak_memory_bytes()
    return {
        "tokens_per_second": step.num_tokens / statistics.median(seconds[1:]),
        "loss": step.loss, "peak_gibibytes": peak / 2**30 if peak else None,
    }  # fmt: skip
