"""The whole way from a picture to its answer, beside the original's own code on the same files.

python benchmarks/original.py --original PYTHON --source DIR --work-dir DIR [--layers 4]

PYTHON is that of an environment with the original's packages (torch of any version, transformers
4.30.0, timm 0.6.13, peft 0.2.0, omegaconf, iopath, sentencepiece, and what they need), DIR a copy
of https://github.com/Vision-CAIR/MiniGPT-4. The published files are those of convert_memory.py:
EVA-ViT-g and Q-Former at full size, and some layers of 7B's widths, with random weights.

Both sides take the same pictures through `generate` and through `describe_all`, on as many threads,
in float32 and in turns; ours also quantised. The original computes a batch padded to its longest
prompt, as its evaluation scripts do. The ratio is that of pictures a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from convert_memory import write_published
from rich.console import Console
from rich.table import Table
from rivals import Program

from minigpt4_runtime import EngineConfig, MiniGPT4, SamplingParams
from minigpt4_runtime.convert.convert import PublishedFiles, convert
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

SCRIPT = Path(__file__).with_name("original_side.py")
PICTURES = sorted((Path(__file__).parents[1] / "examples/images").glob("*.png"))
PROMPT = "###Human: <Img><ImageHere></Img> Describe this picture.###Assistant: "


class Original:
    """The original's code in a process of its own."""

    def __init__(self, python: str, source: Path, files: Path) -> None:
        self._program = Program(python, SCRIPT)
        self._program.ask(
            source=str(source.resolve()),
            files=str(files.resolve()),
            threads=torch.get_num_threads(),
        )

    def answer(self, pictures: Sequence[Path], num_new: int) -> tuple[float, list[str]]:
        """The seconds and the answers of one batch."""
        got = self._program.ask(pictures=list(map(str, pictures)), prompt=PROMPT, new=num_new)
        return got["seconds"], got["answers"]


class Ours:
    """The engine without its caches of pictures and of prompts."""

    def __init__(self, folder: Path) -> None:
        engine = EngineConfig(prefix_cache=False, image_cache_bytes=0)
        self._model = MiniGPT4.load(folder, device="cpu", engine=engine)

    def answer(self, pictures: Sequence[Path], num_new: int) -> tuple[float, list[str]]:
        """The seconds and the answers of all pictures, which run together."""
        sampling = SamplingParams(max_new_tokens=num_new, min_new_tokens=num_new, stop=())
        started = time.perf_counter()
        results = self._model.describe_all(pictures, PROMPT, sampling, is_raw=True)
        said = [each.reply.text for each in results if each.reply]
        return time.perf_counter() - started, said


def make_files(folder: Path, num_layers: int) -> None:
    """The published files and our two folders, where they are not there yet."""
    files = folder / "published"
    if not (files / "projection.pth").exists():
        wanted = argparse.Namespace(
            layers=num_layers, shards=1, query_layers=12, delta=False, legacy=False, v2=False
        )
        write_published(files, wanted)
        # transformers finds a single shard by this name alone.
        (shard,) = (files / "llama").glob("*.bin")
        shard.rename(shard.with_name("pytorch_model.bin"))
    if not (folder / "float").exists():
        parts = PublishedFiles(
            language_dir=files / "llama", vision=files / "eva_vit_g.pth",
            projection=files / "projection.pth", qformer=files / "blip2.pth",
            bert_dir=files / "bert",
        )  # fmt: skip
        convert(parts, folder / "float")
    if not (folder / "w8a8").exists():
        quantise(folder / "float", folder / "w8a8", QuantisePlan(weights="w8a8"))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--original", required=True, help="the Python of its environment")
    parser.add_argument("--source", type=Path, required=True, help="a copy of its repository")
    parser.add_argument("--work-dir", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    make_files(args.work_dir, args.layers)
    sides: dict[str, Any] = {
        "original": Original(args.original, args.source, args.work_dir / "published"),
        **{name: Ours(args.work_dir / name) for name in ("float", "w8a8")},
    }
    title = f"{torch.get_num_threads()} threads, {args.layers} layers, {args.new} new tokens"
    table = Table("pictures", "side", "ratio", "seconds", "lowest", "highest", "same answers",
                  title=title)  # fmt: skip
    for batch in args.batch:
        pictures = (PICTURES * batch)[:batch]
        times: dict[str, list[float]] = {name: [] for name in sides}
        said: dict[str, list[str]] = {}
        for repeat in range(args.repeats + 1):
            for name, side in sides.items():
                print(f"{batch} {name} …", file=sys.stderr)
                # The first, for which each side prepares much, is short.
                seconds, answers = side.answer(pictures, args.new if repeat else 2)
                if repeat:
                    times[name].append(seconds)
                    said[name] = answers
        for name, taken in times.items():
            middle = statistics.median(taken)
            same = sum(
                one == other for one, other in zip(said[name], said["original"], strict=True)
            )
            table.add_row(
                str(batch), name, f"{statistics.median(times['original']) / middle:.2f}",
                f"{middle:.2f}", f"{min(taken):.2f}", f"{max(taken):.2f}", f"{same} of {batch}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
