"""The image side in torch, ONNX Runtime, OpenVINO and transformers: same process and weights.

python benchmarks/vision_export.py --work-dir DIR --keep
python benchmarks/vision.py --model DIR/model --graph DIR/graph [--batch 1 4] [--json vision.json]
                            [--quantised DIR]

Each side encodes the same random images, with as many threads, in turns and in float32; torch and
OpenVINO once more in bfloat16, which OpenVINO takes by itself where the processor can. OpenVINO
reads the same graph as ONNX Runtime. transformers is Blip2VisionModel, Blip2QFormerModel and
our projection, on the same tensors as the torch side. Both are left out where they are not
installed. Before they are timed all sides must give the same rows; of bfloat16 and of the same
model quantised, the distance is printed. The table has latencies, ratios of medians (above 1 if a
side is faster than transformers), and the speed of the tower's products as a share of the machine's
best, measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import find_graph
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.kernels.registry import linear_kernel
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.optional import require
from minigpt4_runtime.vision.registry import vision_encoder

Encode = Callable[[Tensor], Tensor]
LARGEST_DIFFERENCE = 1e-4  # Of the largest value.
PRODUCT_SIDE = 2048
# Those may give other rows.
ROUNDED = ("quantised", "torch-bf16", "openvino-bf16")
# Ours → transformers', wherever the name stands.
TOWER_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"attention_norm\.", "layer_norm1."),
    (r"mlp_norm\.", "layer_norm2."),
    (r"attention\.qkv\.", "self_attn.qkv."),
    (r"attention\.out\.", "self_attn.projection."),
    (r"mlp_in\.", "mlp.fc1."),
    (r"mlp_out\.", "mlp.fc2."),
    (r"^(patch|class|position)_", r"embeddings.\1_"),
)
QFORMER_NAMES = (
    (r"^query_norm\.", "layernorm."),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.cross_attention\.(query|key|value)\.", r".crossattention.attention.\1."),
    (r"\.attention\.out\.", ".attention.output.dense."),
    (r"\.cross_attention\.out\.", ".crossattention.output.dense."),
    (r"\.attention\.norm\.", ".attention.output.LayerNorm."),
    (r"\.cross_attention\.norm\.", ".crossattention.output.LayerNorm."),
    (r"mlp_in\.", "intermediate_query.dense."),
    (r"mlp_out\.", "output_query.dense."),
    (r"mlp_norm\.", "output_query.LayerNorm."),
)


def renamed(weights: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The same tensors by transformers' names."""
    found = {}
    for name, weight in weights.items():
        for ours, theirs in names:
            name = re.sub(ours, theirs, name)
        found[name] = weight
    return found


def transformers_side(ours: VisionPart, config: ModelConfig) -> Encode:
    """Blip2VisionModel, Blip2QFormerModel and our projection, on the tensors of `ours`."""
    assert ours.qformer is not None
    assert config.qformer is not None
    tower = _their_tower(ours, config.vision)
    qformer = _their_qformer(ours, config.qformer, config.vision.hidden_size)
    queries = ours.qformer.query_tokens

    def encode(pixels: Tensor) -> Tensor:
        hidden = tower(pixels).last_hidden_state
        read = qformer(
            query_embeds=queries.expand(len(pixels), -1, -1), encoder_hidden_states=hidden
        )
        rows: Tensor = ours.projection(read.last_hidden_state)
        return rows

    return encode


def _transformers() -> ModuleType:
    return require("transformers", install="pip install transformers")


def _their_tower(ours: VisionPart, config: VisionConfig) -> nn.Module:
    theirs = _transformers().Blip2VisionConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads, image_size=config.image_size,
        layer_norm_eps=config.layer_norm_eps,
    )  # fmt: skip
    with torch.device("meta"):
        tower = _transformers().Blip2VisionModel(theirs)
    weights = renamed(ours.vit.state_dict(), TOWER_NAMES)
    patch = config.patch_size
    weights["embeddings.patch_embedding.weight"] = weights[
        "embeddings.patch_embedding.weight"
    ].view(-1, 3, patch, patch)
    for name in ("class", "position"):
        key = f"embeddings.{name}_embedding"
        weights[key] = weights[key].view(1, -1, config.hidden_size)
    weights |= {f"post_layernorm.{n}": w for n, w in ours.ln_vision.state_dict().items()}
    tower.load_state_dict(weights, assign=True)
    tower.post_layernorm.eps = config.ln_vision_eps
    return tower.eval()  # type: ignore[no-any-return]


def _their_qformer(ours: VisionPart, config: QFormerConfig, width: int) -> nn.Module:
    theirs = _transformers().Blip2QFormerConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, encoder_hidden_size=width,
        num_attention_heads=config.num_attention_heads, layer_norm_eps=config.layer_norm_eps,
        cross_attention_frequency=config.cross_attention_frequency,
    )  # fmt: skip
    with torch.device("meta"):
        qformer = _transformers().Blip2QFormerModel(theirs)
    assert ours.qformer is not None
    weights = renamed(ours.qformer.state_dict(), QFORMER_NAMES)
    del weights["query_tokens"]
    qformer.load_state_dict(weights, assign=True)
    return qformer.eval()  # type: ignore[no-any-return]


def in_bfloat16(folder: Path) -> Encode:
    """Our torch side with weights and rows of bfloat16."""
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    kernel_of = partial(linear_kernel, device=cpu, widen_from=None)
    encoder = vision_encoder("torch")(load_vision(folder, dtype=dtype, kernel_of=kernel_of))
    return lambda pixels: encoder.encode(pixels.to(dtype)).float()


def openvino_side(graph: Path, precision: str) -> Encode:
    """OpenVINO on the CPU, which reads the exported graph."""
    openvino = require("openvino", install="pip install openvino")
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
    model = openvino.Core().compile_model(str(graph), "CPU", settings)
    return lambda pixels: torch.from_numpy(model(pixels.numpy())[0])


def open_sides(args: argparse.Namespace) -> dict[str, Encode]:
    """All sides that are available here, by name."""
    cpu, config = torch.device("cpu"), load_config(args.model)
    kernel_of = partial(linear_kernel, device=cpu, widen_from=None)
    vision = load_vision(args.model, dtype=torch.float32, kernel_of=kernel_of)
    graph = find_graph(args.graph, args.model, runtime="onnx")
    sides: dict[str, Encode] = {
        "torch": vision_encoder("torch")(vision).encode,
        "torch-bf16": in_bfloat16(args.model),
        "onnx": vision_encoder("onnx")(
            graph.path, graph.batch_sizes, device=cpu, dtype=torch.float32, provider="cpu"
        ).encode,
    }
    if importlib.util.find_spec("openvino"):
        sides["openvino"] = openvino_side(graph.path, "f32")
        sides["openvino-bf16"] = openvino_side(graph.path, "bf16")
    if importlib.util.find_spec("transformers") and config.qformer:
        sides["transformers"] = transformers_side(vision, config)
    if args.quantised:
        rounded = load_vision(args.quantised, dtype=torch.float32, kernel_of=kernel_of)
        sides["quantised"] = vision_encoder("torch")(rounded).encode
    return sides


@dataclass(frozen=True)
class Line:
    """One side at one batch size: seconds of each repeat."""

    side: str
    batch: int
    seconds: list[float]
    gflop: float

    @property
    def median(self) -> float:
        """Of one call."""
        return statistics.median(self.seconds)


def measure(sides: dict[str, Encode], pixels: Tensor, repeats: int, gflop: float) -> list[Line]:
    """Time the sides in turns, after a warm-up that checks that all give the same rows."""
    rows = {name: encode(pixels) for name, encode in sides.items()}
    for name, each in rows.items():
        share = float((each - rows["torch"]).abs().max() / rows["torch"].abs().max())
        if name in ROUNDED:
            print(f"{name}: rows differ by {share:.1e} of the largest value at most")
            continue
        assert share <= LARGEST_DIFFERENCE, f"{name} differs by {share:.1e} of the largest value"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, encode in sides.items():
            started = time.perf_counter()
            encode(pixels)
            times[name].append(time.perf_counter() - started)
    return [Line(name, len(pixels), seconds, gflop) for name, seconds in times.items()]


def count_gflop(vision: VisionConfig) -> float:
    """The tower's products for one image; all later products are a fiftieth of them."""
    rows, width = vision.num_patches + 1, vision.hidden_size
    layer = 2 * rows * width * (4 * width + 2 * vision.intermediate_size) + 4 * rows**2 * width
    return vision.num_hidden_layers * layer / 1e9


def best_gflops() -> float:
    """The machine's best rate: GFLOP/s of a large product."""
    a, b = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * PRODUCT_SIDE**3 / 1e9 / (time.perf_counter() - started))
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--graph", type=Path, required=True, help="exported for any batch, float32")
    parser.add_argument("--quantised", type=Path, help="the same model, quantised")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the times there too")
    args = parser.parse_args()
    config, lines = load_config(args.model), []
    size, lots = config.vision.image_size, torch.Generator().manual_seed(0)
    with torch.inference_mode():
        sides, best = open_sides(args), best_gflops()
        for batch in args.batch:
            pixels = torch.randn(batch, 3, size, size, generator=lots)
            gflop = count_gflop(config.vision) * batch
            lines += measure(sides, pixels, args.repeats, gflop)
        best = max(best, best_gflops())
    show(lines, best)
    if args.json:
        machine = {"machine": platform.platform(), "threads": torch.get_num_threads(),
                   "gflops": best, "load": os.getloadavg()}  # fmt: skip
        text = json.dumps({**machine, "lines": [asdict(line) for line in lines]}, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")


def show(lines: list[Line], best: float) -> None:
    """Print the table."""
    peers = {line.batch: line for line in lines if line.side == "transformers"}
    table = Table("batch", "side", "median", "lowest", "highest", "ratio", "share of the ceiling",
                  title=f"{torch.get_num_threads()} threads, {best:.0f} GFLOP/s")  # fmt: skip
    for line in lines:
        ratio = f"{peers[line.batch].median / line.median:.2f}" if line.batch in peers else ""
        table.add_row(
            str(line.batch), line.side, f"{line.median:.2f} s", f"{min(line.seconds):.2f} s",
            f"{max(line.seconds):.2f} s", ratio, f"{line.gflop / line.median / best:.0%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
