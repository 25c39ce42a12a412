"""Prompts of thousands of tokens: what each token costs, attention's share, memory, Python's work.

python benchmarks/long_prompts.py
python benchmarks/long_prompts.py --lengths 4000,16000 --hidden 1024 --json long.json

The model has random weights, heads 128 wide and positions stretched by YaRN. Each prompt is read in
steps of at most 512 tokens, and one token is answered. Attention is the time within torch's
scaled_dot_product_attention. Memory is what the process takes beyond the weights, beside the size
of the prompt's keys and values. Python's work are the calls of a step: the mean of the first five
whole steps but the very first, and of the last five.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from torch.nn import functional

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.config import EngineConfig, LanguageConfig, ModelConfig, VisionConfig
from minigpt4_runtime.engine.engine import Engine

STEP_TOKENS = 512
TRAINED = 4096


@dataclass(frozen=True)
class Found:
    """One prompt's numbers."""

    length: int
    token_ms: float
    attention_share: float
    memory_in_caches: float | None
    calls_at_start: float
    calls_at_end: float


class Meter:
    """Counts the calls of each engine step, and times attention."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.attention_seconds = 0.0
        self._is_inside = False
        self._attention = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = self._timed
        threading.setprofile(self._count)  # Of the engine's threads, which start later.

    def clear(self) -> None:
        """Begin again."""
        self.calls.clear()
        self.attention_seconds = 0.0

    def _timed(self, *args: Any, **named: Any) -> Tensor:
        started = time.perf_counter()
        attended = self._attention(*args, **named)
        self.attention_seconds += time.perf_counter() - started
        return attended

    def _count(self, frame: FrameType, event: str, _: object) -> None:
        if frame.f_code is Engine.step.__code__ and event in ("call", "return"):
            self._is_inside = event == "call"
            if self._is_inside:
                self.calls.append(0)
        elif self._is_inside and event in ("call", "c_call"):
            self.calls[-1] += 1


def make_config(hidden: int, num_layers: int, longest: int) -> ModelConfig:
    """A Llama of that width, whose positions reach the longest prompt, and a tiny image side."""
    vision = VisionConfig(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    language = LanguageConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=num_layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, vocab_size=4096,
        max_position_embeddings=TRAINED, rms_norm_eps=1e-6,
    )  # fmt: skip
    factor = max(1, -(-(longest + 64) // TRAINED))
    language = language.stretched(f"yarn:{factor}")
    return ModelConfig(vision=vision, qformer=None, language=language, template="llama2")


def measure(model: MiniGPT4, meter: Meter, length: int) -> Found:
    """Read one prompt."""
    rng = random.Random(length)
    prompt = [rng.randrange(3, 4096) for _ in range(length)]
    num_blocks = -(-length // EngineConfig.block_size) + 1
    config = EngineConfig(
        max_running=1, max_step_tokens=STEP_TOKENS, num_blocks=num_blocks, prefix_cache=False
    )
    model.probe.use_engine(config)
    model.probe.reset_peak_memory()
    before = model.probe.peak_memory_bytes()
    meter.clear()
    started = time.perf_counter()
    list(model.probe.submit_tokens(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True)))
    seconds = time.perf_counter() - started
    peak = model.probe.peak_memory_bytes()
    cache_bytes = length * token_bytes(model.config.language, model.dtype)
    # Without the first step and the last, which has fewer tokens and ends the request.
    whole = [n for n in meter.calls if n][1 : length // STEP_TOKENS]
    return Found(
        length,
        seconds / length * 1e3,
        meter.attention_seconds / seconds,
        (peak - before) / cache_bytes if peak and before else None,
        statistics.fmean(whole[:5]),
        statistics.fmean(whole[-5:]),
    )


def numbers(text: str) -> list[int]:
    """4000,16000 → [4000, 16000]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=numbers, default=[4000, 16000, 32000])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = make_config(options.hidden, options.layers, max(options.lengths))
    meter = Meter()
    with MiniGPT4.with_random_weights(config, device="cpu", engine={"num_blocks": 1}) as model:
        measure(model, meter, 2 * STEP_TOKENS + 1)  # Warms up.
        found = [measure(model, meter, length) for length in options.lengths]
    print("tokens   per token   attention   memory / cache   calls a step, start   end")
    for each in found:
        memory = "?" if each.memory_in_caches is None else f"{each.memory_in_caches:.2f}"
        print(
            f"{each.length:>6}{each.token_ms / found[0].token_ms:>12.2f}"
            f"{each.attention_share:>12.0%}{memory:>17}"
            f"{each.calls_at_start:>22.0f}{each.calls_at_end:>6.0f}"
        )
    print(f"1 is {found[0].token_ms:.2f} ms a token.")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
