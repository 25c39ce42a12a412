"""The memory and time to export the image side at its published size, and the graph's size.

python benchmarks/vision_export.py --work-dir /tmp/vision_export [--dtype float16] [--keep]

The model is synthetic: EVA-ViT-g (1408 wide, 39 layers), a Q-Former of 12 layers and random weights
in float32, with a language model of one layer that the export does not read. The peak is that of
the exporting process, including mapped files and the comparison with torch. --keep keeps DIR/model
and DIR/graph for benchmarks/vision.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from load_memory import TOKENIZER, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minigpt4_runtime import image
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.weights import TensorShape, show_bytes
from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.export.onnx import GraphPlan, export_onnx

PICTURES = Path(__file__).parents[1] / "examples" / "images"


class RandomWeights(Mapping[str, Tensor]):
    """Untrained weights, generated on request from a fixed seed."""

    def __init__(self, shapes: Mapping[str, TensorShape]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        shape, lots = self._shapes[name], torch.Generator().manual_seed(zlib.crc32(name.encode()))
        is_scale = len(shape) == 1 and name.endswith("weight")
        return torch.randn(shape, generator=lots) * 0.02 + float(is_scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def full_config(num_layers: int) -> ModelConfig:
    """The image side as published, projected to 7B's width."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=224, patch_size=14, hidden_size=1408, num_hidden_layers=num_layers,
            num_attention_heads=16, intermediate_size=6144,
        ),
        qformer=QFormerConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            num_query_tokens=32,
        ),
        language=LanguageConfig(
            hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32, max_position_embeddings=64, rms_norm_eps=1e-6,
        ),
        template="vicuna",
    )  # fmt: skip


def export(model_dir: Path, graph_dir: Path, plan: GraphPlan) -> None:
    """Export in this process, and print time and memory."""
    before, started = peak_bytes(), time.perf_counter()
    images = [image(path) for path in sorted(PICTURES.iterdir())]
    record = export_onnx(model_dir, graph_dir, images=images, plan=plan, force=True)
    seconds = time.perf_counter() - started
    print(json.dumps([before, peak_bytes(), seconds, sum(record.files.values()),
                      record.check.largest_relative, record.check.bound]))  # fmt: skip


def main() -> None:
    """Make the folder, export it in another process, and show the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="12 GiB, for all that is made")
    parser.add_argument("--layers", type=int, default=39, help="of the image tower")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--batch", choices=("1", "dynamic"), default="dynamic")
    parser.add_argument("--keep", action="store_true", help="leave model and graph there")
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model_dir, graph_dir = args.work_dir / "model", args.work_dir / "graph"
    if args.export:
        sizes = (1,) if args.batch == "1" else None
        export(model_dir, graph_dir, GraphPlan(dtype=args.dtype, batch_sizes=sizes))
        return
    config = full_config(args.layers)
    try:
        write_folder(model_dir, config, RandomWeights(model_shapes(config)), TOKENIZER, force=True)
        command = [sys.executable, __file__, "--export", *sys.argv[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        show(args.dtype, json.loads(done.stdout.splitlines()[-1]))
    finally:
        if not args.keep:
            for folder in (model_dir, graph_dir):
                shutil.rmtree(folder, ignore_errors=True)


def show(dtype: str, taken: list[float]) -> None:
    """Print the table."""
    before, peak, seconds, num_bytes, relative, bound = taken
    table = Table("graph in", "imports", "peak", "time", "graph", "difference", "allowed",
                  title="Exporting the image side at its published size")  # fmt: skip
    table.add_row(dtype, show_bytes(int(before)), show_bytes(int(peak)), f"{seconds:.0f} s",
                  show_bytes(int(num_bytes)), f"{relative:.1e}", f"{bound:g}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
