"""The memory that loading a synthetic model folder takes: unchanged, cast, and divided.

python benchmarks/load_memory.py --work-dir /tmp/load_memory

Promise: no more than 1.15 times the weights in their dtype in memory, and with several ranks, 1.15
times a rank's share. Every page of every weight is touched, so that a mapped file counts in full.
Memory is the peak of resident pages of a process that only loads. Its imports are included, except
for a rank, whose share of this small model is smaller than the imports.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.weights import TensorShape, show_bytes
from minigpt4_runtime.config import LanguageConfig, ModelConfig, VisionConfig
from minigpt4_runtime.model.parallel import Solo

TOKENIZER = Path(__file__).parents[1] / "tests/goldens/vicuna/checkpoint/llama/tokenizer.model"
PROMISE = 1.15


class MadeWeights(Mapping[str, Tensor]):
    """Weights that are generated on request and not kept."""

    def __init__(self, shapes: Mapping[str, TensorShape]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        return torch.full(self._shapes[name], 0.01, dtype=torch.float16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def made_config(num_layers: int) -> ModelConfig:
    """7B's widths with fewer layers, and a small image tower of the Llama-2 variant."""
    vision = VisionConfig(
        image_size=224, patch_size=14, hidden_size=1408, num_hidden_layers=2,
        num_attention_heads=16, intermediate_size=6144,
    )  # fmt: skip
    language = LanguageConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=num_layers,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    return ModelConfig(vision=vision, qformer=None, language=language, template="llama2")


def peak_bytes() -> int:
    """The most memory that this process has had, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at the fork.
        line = next(ln for ln in status.read_text("utf-8").splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OneOf(Solo):
    """A rank that does not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def measure(folder: Path, dtype: str, size: int) -> None:
    """Load in this process, touch every page, and print time and memory."""
    before, started = peak_bytes(), time.perf_counter()
    cpu, torch_dtype = torch.device("cpu"), getattr(torch, dtype)
    model: nn.Module
    if size == 1:
        model = load_model(folder, device=cpu, dtype=torch_dtype)
    else:
        model = load_language(folder, device=cpu, dtype=torch_dtype, group=OneOf(1, size))
    seconds = time.perf_counter() - started
    for weight in model.parameters():
        weight.view(-1)[::512].sum()
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    print(json.dumps([before, peak_bytes(), num_bytes, seconds]))


def main() -> None:
    """Write a folder, load it in other processes, and show the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="a folder for the model")
    parser.add_argument("--layers", type=int, default=8, help="of the language model, 386 MiB each")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work_dir / "model"
    if args.measure:
        dtype, size = args.measure.split("/")
        measure(folder, dtype, int(size))
        return
    config, rows = made_config(args.layers), []
    try:
        weights = MadeWeights(model_shapes(config))
        write_folder(folder, config, weights, TOKENIZER, dtype="float16", force=True)
        for dtype in ("float16", "bfloat16", "float32"):
            for size in (1, *args.ranks):
                command = [sys.executable, __file__, "--measure", f"{dtype}/{size}", *sys.argv[1:]]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(Loaded(dtype, size, *json.loads(done.stdout)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(rows)


@dataclass(frozen=True)
class Loaded:
    """The time and memory to load all of a model, or its part for rank 1 of `num_ranks`."""

    dtype: str
    num_ranks: int
    import_bytes: int
    peak_bytes: int
    weight_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        """The peak as a share of the weights."""
        taken = self.peak_bytes - (self.import_bytes if self.num_ranks > 1 else 0)
        return taken / self.weight_bytes


def show(rows: list[Loaded]) -> None:
    """Print the table, and fail if the promise is broken."""
    table = Table("loaded in", "ranks", "weights", "imports", "peak", "peak / weights", "time",
                  title="Loading a float16 folder on a CPU")  # fmt: skip
    for row in rows:
        table.add_row(
            row.dtype, str(row.num_ranks), show_bytes(row.weight_bytes),
            show_bytes(row.import_bytes), show_bytes(row.peak_bytes), f"{row.share:.3f}",
            f"{row.seconds:.1f} s",
        )  # fmt: skip
    Console().print(table)
    if any(row.share > PROMISE for row in rows):
        sys.exit(f"The promise is broken: more than {PROMISE} times the weights.")


if __name__ == "__main__":
    main()
