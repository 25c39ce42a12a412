"""The memory and the time that a training step takes at the shapes of a published 7B model.

python benchmarks/tuning_memory.py [--preset vicuna-7b] [--sequences 4] [--length 128]
python benchmarks/tuning_memory.py --processes 2    # the weights divided, as with --divide

Each row is a process of its own, with random weights and one or two layers. It loads, and then
learns from the same batch a few times: memory is what is resident once it has loaded, and the peak
of the steps; time is what the median step takes of the processors, which other programs change
little: with OMP_NUM_THREADS=1 it is that of one core. A row "per layer" is the difference of the
two, and what all layers take is reckoned from it: the row of one layer, plus (layers - 1) times
that of a layer. Of several processes the numbers are those of the first; each has as many sequences
as one alone. Layers are computed again on the way back, as with --recompute; LoRA has rank 16 on
q_proj and v_proj.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minigpt4_runtime.checkpoint.blank_model import Where, blank_for
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.devices.group import TorchGroup
from minigpt4_runtime.lab.modules import PlainOperations
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.tune.data import Example, TuningData
from minigpt4_runtime.tune.frozen import divided_kernel, frozen_kernel
from minigpt4_runtime.tune.image_end import ImageEnd
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.lora import adapt
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.together import Alone, Processes
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


def make_training(
    config: ModelConfig,
    weights: str,
    settings: TuneSettings,
    *,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes | None = None,
) -> Training:
    """Random weights, and a batch of random sequences to learn from."""
    divided = partial(divided_kernel, processes) if settings.divide and processes else None
    where = Where(
        device=device, dtype=dtype, kernel_of=divided or frozen_kernel, operations=PlainOperations()
    )
    language = blank_for(where, config, {"language.layers": weights}).language
    fill_at_random(language, device=device, dtype=dtype)
    end = ImageEnd(config, with_qformer=False)
    for each in end.parameters():
        torch.nn.init.uniform_(each, -0.01, 0.01)
    learner = Learner(language, end.to(device), adapt(language, settings, device))
    if settings.recompute:
        learner.recompute()
    count = settings.batch_size
    features = torch.randn(count, config.rows_per_image, config.projection_width)
    return Training(learner, make_batch(config, count, length), features, settings, processes)


def measure(case: str, given: argparse.Namespace, processes: Processes) -> dict[str, float]:
    """What one case takes: weights, dtype, rank of LoRA and layers."""
    weights, dtype, rank, num_layers = case.split(",")
    whole = PRESETS[given.preset]
    config = replace(whole, language=replace(whole.language, num_hidden_layers=int(num_layers)))
    settings = TuneSettings(
        batch_size=given.sequences * processes.size, at_once=given.sequences, lora=int(rank),
        recompute=True, divide=processes.size > 1,
    )  # fmt: skip
    imported = resident("VmRSS")
    training = make_training(
        config, weights, settings, length=given.length, device=torch.device("cpu"),
        dtype=getattr(torch, dtype), processes=processes,
    )  # fmt: skip
    loaded = resident("VmRSS")
    forget_peak()
    seconds = []
    for number in range(NUM_STEPS):
        started = time.process_time()
        training.step(number)
        seconds.append(time.process_time() - started)
    return {
        "loaded": loaded - imported, "peak": resident("VmHWM") - imported,
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def run_case(case: str, given: argparse.Namespace) -> list[float]:
    """What the first of a case's processes says."""
    command = [sys.executable, __file__, "--case", case, "--preset", given.preset,
               "--sequences", str(given.sequences), "--length", str(given.length),
               "--processes", str(given.processes)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen([*command, "--rank", f"{rank},{folder}"], stdout=subprocess.PIPE)
            for rank in range(given.processes)
        ]
        said = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        raise SystemExit(f"{case} failed.")
    return list(json.loads(said[0]).values())


def main() -> None:
    """Run every case in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="vicuna-7b")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        number, _, folder = given.rank.partition(",")
        processes: Processes = Alone()
        if given.processes > 1:
            processes = TorchGroup(int(number), given.processes, folder=Path(folder))
        found = measure(given.case, given, processes)
        if not processes.rank:
            print(json.dumps(found))
        return
    num_layers = PRESETS[given.preset].language.num_hidden_layers
    print(f"| weights | LoRA | | loaded, GiB | peak, GiB | a step, CPU s |\n|{'---|' * 6}")
    for weights, dtype, rank in CASES:
        rows = [run_case(f"{weights},{dtype},{rank},{count}", given) for count in (1, 2)]
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
