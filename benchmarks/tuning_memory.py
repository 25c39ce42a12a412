"""The memory and the time that a training step takes at the shapes of a published 7B model.

python benchmarks/tuning_memory.py [--preset vicuna-7b] [--sequences 4] [--length 128]

Each row is a process of its own, with random weights and one or two layers. It loads, and then
learns from the same batch a few times: memory is what is resident once it has loaded, and the peak
of the steps; time is what the median step takes of the processors, which other programs change
little: with OMP_NUM_THREADS=1 it is that of one core. A row "per layer" is the difference of the
two, and what all layers take is reckoned from it: the row of one layer, plus (layers - 1) times
that of a layer. Layers are computed again on the way back, as with --recompute; LoRA has rank 16 on
q_proj and v_proj.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from minigpt4_runtime.checkpoint.blank_model import Where, blank_for
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.lab.modules import PlainOperations
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.tune.data import Example, TuningData
from minigpt4_runtime.tune.frozen import frozen_kernel
from minigpt4_runtime.tune.image_end import ImageEnd
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.lora import adapt
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.tune import Training

GIB = 2**30
CASES = (
    ("float", "bfloat16", 0), ("float", "bfloat16", 16), ("w8a16", "bfloat16", 16),
    ("w4a16-g128", "bfloat16", 16),
)  # fmt: skip
NUM_STEPS = 3


def resident(field: str) -> int:
    """Bytes of this process in memory: now, "VmRSS", or at most since `forget_peak`, "VmHWM"."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def forget_peak() -> None:
    """Linux begins to watch the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def make_batch(config: ModelConfig, count: int, length: int) -> TuningData:
    """Sequences of one picture each; the last quarter is the answer."""
    said = length // 4
    prompt = tuple(10 + number % 1000 for number in range(length - said))
    examples = tuple(
        Example(f"example {number}", prompt, tuple(range(20, 20 + said)), (5,), (number,), "", "")
        for number in range(count)
    )
    assert config.rows_per_image + 5 < len(prompt), "a picture has room"
    return TuningData("", examples, (), ())


def measure(
    preset: str, weights: str, dtype: str, rank: int, *, size: tuple[int, int, int]
) -> None:
    """Print what one case takes, as JSON: `size` is layers, sequences and their length."""
    num_layers, count, length = size
    whole = PRESETS[preset]
    config = replace(whole, language=replace(whole.language, num_hidden_layers=num_layers))
    settings = TuneSettings(batch_size=count, at_once=count, lora=rank, recompute=True)
    cpu, floats = torch.device("cpu"), getattr(torch, dtype)
    where = Where(device=cpu, dtype=floats, kernel_of=frozen_kernel, operations=PlainOperations())
    imported = resident("VmRSS")
    language = blank_for(where, config, {"language.layers": weights}).language
    fill_at_random(language, device=cpu, dtype=floats)
    end = ImageEnd(config, with_qformer=False)
    for each in end.parameters():
        torch.nn.init.uniform_(each, -0.01, 0.01)
    learner = Learner(language, end, adapt(language, settings, cpu))
    learner.recompute()
    data = make_batch(config, count, length)
    features = torch.randn(count, config.rows_per_image, config.projection_width)
    training = Training(learner, data, features, settings)
    loaded = resident("VmRSS")
    forget_peak()
    seconds = []
    for number in range(NUM_STEPS):
        started = time.process_time()
        training.step(number)
        seconds.append(time.process_time() - started)
    found = {
        "loaded": loaded - imported, "peak": resident("VmHWM") - imported,
        "seconds": statistics.median(seconds),
    }  # fmt: skip
    print(json.dumps(found))


def main() -> None:
    """Run every case in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="vicuna-7b")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        weights, dtype, rank, num_layers = given.case.split(",")
        size = (int(num_layers), given.sequences, given.length)
        measure(given.preset, weights, dtype, int(rank), size=size)
        return
    num_layers = PRESETS[given.preset].language.num_hidden_layers
    print(f"| weights | LoRA | | loaded, GiB | peak, GiB | a step, CPU s |\n|{'---|' * 6}")
    for weights, dtype, rank in CASES:
        rows = []
        for count in (1, 2):
            case = f"{weights},{dtype},{rank},{count}"
            done = subprocess.run(
                [sys.executable, __file__, "--case", case, "--preset", given.preset,
                 "--sequences", str(given.sequences), "--length", str(given.length)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            rows.append(list(json.loads(done.stdout).values()))
        layer = [second - first for first, second in zip(*rows, strict=True)]
        all_layers = [
            first + (num_layers - 1) * more for first, more in zip(rows[0], layer, strict=True)
        ]
        name = f"{weights}, {dtype}"
        for what, values in (
            ("1 layer", rows[0]), ("2 layers", rows[1]), ("per layer", layer),
            (f"{num_layers} layers, reckoned", all_layers),
        ):  # fmt: skip
            cells = f"{values[0] / GIB:.2f} | {values[1] / GIB:.2f} | {values[2]:.2f}"
            print(f"| {name} | {rank or '–'} | {what} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
