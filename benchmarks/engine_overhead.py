"""The cost of an engine step without the model: scheduling, buffers, kernel preparation.

python benchmarks/engine_overhead.py
python benchmarks/engine_overhead.py --contexts 100,4000 --sequences 1,256 --json overhead.json

The model has 7B's depth and computes nothing: it returns the embeddings, and constant logits. This
times the engine's own work for a step in which every sequence decodes one token, from the plan to
the events in the tickets. Each number is the median over several series of steps, as a multiple of
the step with the first context and the first number of sequences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from minigpt4_runtime.config import EngineConfig, LanguageConfig, SamplingParams
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import Heard, NoWatch, Request
from minigpt4_runtime.model.llama import Attend, Llama
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.rank_model import RankModel
from minigpt4_runtime.ranks import make_runner

VOCABULARY = 64
STRETCHES = 5
STEPS_PER_STRETCH = 40


class IdleLlama:
    """A model with a Llama's shape that computes nothing."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.group = Solo()
        self.num_key_value_heads = config.num_key_value_heads
        table = torch.zeros(VOCABULARY, config.hidden_size, dtype=torch.float16)
        self.token_embedding = torch.nn.Embedding(VOCABULARY, config.hidden_size, _weight=table)
        self._logits = torch.zeros(4096, VOCABULARY)
        self._rows = torch.zeros(4096, config.hidden_size, dtype=torch.float16)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows, always the same."""
        return self._rows[: len(token_ids)]

    def __call__(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:  # noqa: ARG002
        """The embeddings."""
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Always the same."""
        return self._logits[: len(hidden)]


class StepClock(NoWatch):
    """Notes the time of each step, as one sequence's tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """Note the engine thread's processor time. No answer ends here."""
        self.times.append(time.thread_time())
        return super().feed(token_id, is_last=is_last)


def step_seconds(context: int, num_sequences: int) -> float:
    """The median time of a step in which all sequences decode, each after `context` tokens."""
    num_steps = STRETCHES * STEPS_PER_STRETCH
    config = LanguageConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=32,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    room = context + 2 * num_steps + 64
    engine_config = EngineConfig(
        max_running=256, max_step_tokens=4096, prefix_cache=False,
        num_blocks=num_sequences * -(-room // 16) + 16,
    )  # fmt: skip
    idle = RankModel(cast(Llama, IdleLlama(config)), None, vision_bytes=0, left_bytes=None)
    runner = make_runner(idle, open_device("cpu"), engine_config)
    engine = Engine(
        runner, engine_config, num_blocks=runner.num_blocks, max_context=8192, bos_id=1, eos_id=2
    )
    sampling = SamplingParams(max_new_tokens=2 * num_steps, ignore_eos=True)
    clock = StepClock()
    tickets = [
        engine.submit(
            Request(tuple([3] * context), (), sampling, clock if last else NoWatch()),
            lambda event: event.token_id,
        )
        for last in [False] * (num_sequences - 1) + [True]
    ]
    # When the last sequence decodes, all others do too.
    while len(clock.times) < num_steps + 10:
        time.sleep(0.01)
    engine.close()
    del tickets
    times = clock.times[9 : 10 + num_steps]
    stretches = times[::STEPS_PER_STRETCH]
    return statistics.median(
        (after - before) / STEPS_PER_STRETCH for before, after in itertools.pairwise(stretches)
    )


def numbers(text: str) -> list[int]:
    """1,8,64 → [1, 8, 64]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", type=numbers, default=[100, 1000, 4000])
    parser.add_argument("--sequences", type=numbers, default=[1, 8, 64, 256])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for count in options.sequences:
        row = {str(context): step_seconds(context, count) for context in options.contexts}
        found[str(count)] = row
    first = found[str(options.sequences[0])][str(options.contexts[0])]
    print("sequences  " + "".join(f"{context:>10} tokens" for context in options.contexts))
    for count, row in found.items():
        print(f"{count:>9}  " + "".join(f"{seconds / first:>17.2f}" for seconds in row.values()))
    print(f"1 is {first * 1e6:.0f} microseconds.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
