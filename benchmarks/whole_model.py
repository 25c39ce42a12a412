"""A whole 7B model with random weights: quantised from a folder of floats, loaded, and asked.

python benchmarks/whole_model.py --work-dir DIR [--format w4a8-g32] [--image-side w8a8] [--new 64]

DIR takes 16 GiB of floats, which stay for the next run, and the quantised folder. The table shows
the peak memory of `minigpt4 quantise` beside what it may take (the largest file and 1 GiB), and the
peak of a process that loads the quantised folder, encodes a picture and answers; the bytes of
weights that decoding reads, as a share of the best rate at which this machine reads; and what a
token of the prompt, the picture and loading take, in multiples of a decoded token.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
from load_memory import TOKENIZER, peak_bytes
from vision_export import RandomWeights

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.machine import processor_name
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.presets import PRESETS

GIB = 2**30


def run_and_measure(command: list[str]) -> tuple[float, int]:
    """The seconds and the peak of resident memory of a program that must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"error: {' '.join(command)} failed.")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit


def answer(folder: Path, num_new: int) -> None:
    """Load and answer in this process; print seconds and memory."""
    times: list[float] = []
    started = time.perf_counter()
    model = MiniGPT4.load(folder, device="cpu")
    loaded = time.perf_counter()
    picture = numpy.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=numpy.uint8)
    model.probe.embed_images([picture])
    again = time.perf_counter()
    model.probe.embed_images([picture])
    encoded = time.perf_counter()
    prompt = list(range(10, 74))
    ticket = model.probe.submit_tokens(
        prompt,
        SamplingParams(ignore_eos=True, max_new_tokens=num_new),
        on_token=lambda _: times.append(time.perf_counter()),
    )
    list(ticket)
    num_bytes = model.probe.weight_bytes()
    print(
        json.dumps({
            "load": loaded - started,
            "picture": encoded - again,
            "prompt": (times[0] - encoded) / len(prompt),
            "token": (times[-1] - times[0]) / (len(times) - 1),
            "read": num_bytes["layers"] + num_bytes["head"],
            "peak": peak_bytes(),
        })
    )  # fmt: skip


def main() -> None:
    """Make the folders where they are missing, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--preset", default="vicuna-7b", choices=PRESETS)
    parser.add_argument("--format", default="w4a8-g32")
    parser.add_argument("--image-side", default="w8a8")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer(args.answer, args.new)
        return
    floats = args.work_dir / args.preset
    quantised = args.work_dir / f"{args.preset}-{args.format}-{args.image_side}"
    if not floats.exists():
        config = PRESETS[args.preset]
        write_folder(
            floats, config, RandomWeights(model_shapes(config)), TOKENIZER, dtype="float16"
        )
    if not quantised.exists():
        largest = max(path.stat().st_size for path in floats.glob("*.safetensors"))
        seconds, peak = run_and_measure([
            sys.executable, "-m", "minigpt4_runtime", "quantise", str(floats),
            "--format", args.format, "--image-side", args.image_side, "--out", str(quantised),
        ])  # fmt: skip
        print(
            f"quantise: {seconds:.0f} s, peak {show_bytes(peak)} of {show_bytes(largest + GIB)} "
            "allowed",
            flush=True,
        )
    command = [sys.executable, __file__, "--work-dir", str(args.work_dir), "--new", str(args.new)]
    done = subprocess.run(
        [*command, "--answer", str(quantised)], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    ceilings = measure_ceilings("cpu", "float32")
    share = found["read"] / found["token"] / 1e9 / ceilings.gigabytes_per_second
    size = sum(path.stat().st_size for path in quantised.iterdir())
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, "
        f"{ceilings.gigabytes_per_second:.1f} GB/s read at best\n"
        f"{quantised.name}: {show_bytes(size)}, peak {show_bytes(found['peak'])}\n"
        f"a token: {found['token']:.3f} s, {share:.0%} of reading; in multiples of it: a token of "
        f"the prompt {found['prompt'] / found['token']:.2f}, a picture "
        f"{found['picture'] / found['token']:.1f}, loading {found['load'] / found['token']:.1f}"
    )


if __name__ == "__main__":
    main()
