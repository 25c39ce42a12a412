"""The memory that `minigpt4 convert` takes, on synthetic published files of several GB.

python benchmarks/convert_memory.py --work-dir /tmp/convert_memory
python benchmarks/convert_memory.py --work-dir /tmp/convert_memory --v2

Promise: no more than the largest published file and 1 GiB. The files have the published layout and
widths (7B's and EVA-ViT-g's), the language model with fewer layers; they are deleted at the end.
Memory is the peak of resident pages, including mapped files, of a process that only converts.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.convert.convert import PublishedFiles, convert

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "vicuna" / "checkpoint"
GIB = 2**30
HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 11008, 32001
WIDTH, VISION_FEED_FORWARD, BLOCKS = 1408, 6144, 40
QUERY_WIDTH, QUERIES = 768, 32
GROUP, RANK = 4, 64  # Of MiniGPT-v2: patches in a row, and the rank of its adapters.


def made(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Fast pseudo-random weights."""
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(1)) * 0.02
    size = torch.Size(shape).numel()
    return pattern.to(dtype).repeat(-(-size // len(pattern)))[:size].view(shape).clone()


def linear(name: str, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A matrix and its bias."""
    return {
        f"{name}.weight": made(rows, columns, dtype=dtype),
        f"{name}.bias": made(rows, dtype=dtype),
    }


def norm(name: str, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LayerNorm."""
    return {
        f"{name}.weight": torch.ones(size, dtype=dtype),
        f"{name}.bias": torch.zeros(size, dtype=dtype),
    }


def llama_layer(layer: int) -> dict[str, Tensor]:
    """A layer of a 7B Llama: 386 MiB."""
    name = f"model.layers.{layer}"
    attention = {
        f"{name}.self_attn.{part}_proj.weight": made(HIDDEN, HIDDEN)
        for part in ("q", "k", "v", "o")
    }
    return attention | {
        f"{name}.mlp.gate_proj.weight": made(FEED_FORWARD, HIDDEN),
        f"{name}.mlp.up_proj.weight": made(FEED_FORWARD, HIDDEN),
        f"{name}.mlp.down_proj.weight": made(HIDDEN, FEED_FORWARD),
        f"{name}.input_layernorm.weight": torch.ones(HIDDEN).half(),
        f"{name}.post_attention_layernorm.weight": torch.ones(HIDDEN).half(),
    }


def llama_shards(num_layers: int, num_shards: int) -> Iterator[dict[str, Tensor]]:
    """The language model's shards: the embedding table is in the first, the head in the last."""
    per_shard = -(-num_layers // num_shards)
    for shard in range(num_shards):
        tensors = {"model.embed_tokens.weight": made(VOCABULARY, HIDDEN)} if shard == 0 else {}
        for layer in range(shard * per_shard, min((shard + 1) * per_shard, num_layers)):
            tensors |= llama_layer(layer)
        if shard == num_shards - 1:
            tensors["model.norm.weight"] = torch.ones(HIDDEN).half()
            tensors["lm_head.weight"] = made(VOCABULARY, HIDDEN)
        yield tensors


def eva_vit() -> dict[str, Tensor]:
    """An image tower with the published file's unused last block."""
    half = torch.float16
    tensors = linear("patch_embed.proj", WIDTH, 3 * 14 * 14, half)
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].view(WIDTH, 3, 14, 14)
    tensors |= {"cls_token": made(1, 1, WIDTH), "pos_embed": made(1, 257, WIDTH)}
    for block in range(BLOCKS):
        name = f"blocks.{block}"
        tensors |= norm(f"{name}.norm1", WIDTH, half) | norm(f"{name}.norm2", WIDTH, half)
        tensors[f"{name}.attn.qkv.weight"] = made(3 * WIDTH, WIDTH)
        tensors[f"{name}.attn.q_bias"] = made(WIDTH)
        tensors[f"{name}.attn.v_bias"] = made(WIDTH)
        tensors |= linear(f"{name}.attn.proj", WIDTH, WIDTH, half)
        tensors |= linear(f"{name}.mlp.fc1", VISION_FEED_FORWARD, WIDTH, half)
        tensors |= linear(f"{name}.mlp.fc2", WIDTH, VISION_FEED_FORWARD, half)
    return tensors


def qformer(num_layers: int) -> dict[str, Tensor]:
    """BLIP-2's file in float32, without the weights that the model does not use."""
    full = torch.float32
    tensors = {"query_tokens": made(1, QUERIES, QUERY_WIDTH, dtype=full)}
    tensors |= norm("ln_vision", WIDTH, full)
    tensors |= norm("Qformer.bert.embeddings.LayerNorm", QUERY_WIDTH, full)
    for layer in range(num_layers):
        name = f"Qformer.bert.encoder.layer.{layer}"
        attentions = ("attention", "crossattention") if layer % 2 == 0 else ("attention",)
        for attention in attentions:
            reads = WIDTH if attention == "crossattention" else QUERY_WIDTH
            block = f"{name}.{attention}"
            tensors |= linear(f"{block}.self.query", QUERY_WIDTH, QUERY_WIDTH, full)
            tensors |= linear(f"{block}.self.key", QUERY_WIDTH, reads, full)
            tensors |= linear(f"{block}.self.value", QUERY_WIDTH, reads, full)
            tensors |= linear(f"{block}.output.dense", QUERY_WIDTH, QUERY_WIDTH, full)
            tensors |= norm(f"{block}.output.LayerNorm", QUERY_WIDTH, full)
        tensors |= linear(f"{name}.intermediate_query.dense", 4 * QUERY_WIDTH, QUERY_WIDTH, full)
        tensors |= linear(f"{name}.output_query.dense", QUERY_WIDTH, 4 * QUERY_WIDTH, full)
        tensors |= norm(f"{name}.output_query.LayerNorm", QUERY_WIDTH, full)
    return tensors


def v2_projection(num_layers: int) -> dict[str, Tensor]:
    """MiniGPT-v2's file in float32: the projection, and adapters of queries and values."""
    tensors = linear("llama_proj", HIDDEN, GROUP * WIDTH, torch.float32)
    for layer in range(num_layers):
        for part in ("q", "v"):
            name = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.lora_A.weight"] = made(RANK, HIDDEN, dtype=torch.float32)
            tensors[f"{name}.lora_B.weight"] = made(HIDDEN, RANK, dtype=torch.float32)
    return tensors


def write_json(path: Path, source: Path, **changes: object) -> None:
    """A golden's config.json with other sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**json.loads(source.read_text("utf-8")), **changes}), "utf-8")


def write_published(folder: Path, args: argparse.Namespace) -> None:
    """Write the files, one shard in memory at a time."""
    llama = folder / "llama"
    write_json(
        llama / "config.json", GOLDEN / "llama" / "config.json", hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD, num_hidden_layers=args.layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=VOCABULARY,
    )  # fmt: skip
    shutil.copy(GOLDEN / "llama" / "tokenizer.model", llama)
    for number, shard in enumerate(llama_shards(args.layers, args.shards), start=1):
        name = f"pytorch_model-{number:05d}-of-{args.shards:05d}.bin"
        if args.delta:
            (folder / "base").mkdir(exist_ok=True)
            torch.save(shard, folder / "base" / name)
            shard = {weight: tensor * 0.01 for weight, tensor in shard.items()}
        torch.save(shard, llama / name, _use_new_zipfile_serialization=not args.legacy)
    torch.save(eva_vit(), folder / "eva_vit_g.pth")
    if args.v2:
        settings = {"model": {"arch": "minigpt_v2"}}
        content = {"model": v2_projection(args.layers), "config": settings}
        torch.save(content, folder / "projection.pth")
        return
    torch.save({"model": qformer(args.query_layers)}, folder / "blip2.pth")
    write_json(
        folder / "bert" / "config.json", GOLDEN / "bert-base-uncased" / "config.json",
        hidden_size=QUERY_WIDTH, num_hidden_layers=args.query_layers, num_attention_heads=12,
        intermediate_size=4 * QUERY_WIDTH,
    )  # fmt: skip
    projection = linear("llama_proj", HIDDEN, QUERY_WIDTH, torch.float32)
    torch.save({"model": projection, "epoch": 4}, folder / "projection.pth")


def peak_bytes() -> int:
    """The most memory that this process has had, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at the fork.
        line = next(ln for ln in status.read_text("utf-8").splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Convert in this process, and print time and memory."""
    files = PublishedFiles(
        language_dir=folder / "llama",
        vision=folder / "eva_vit_g.pth",
        projection=folder / "projection.pth",
        qformer=None if args.v2 else folder / "blip2.pth",
        bert_dir=None if args.v2 else folder / "bert",
        base_dir=folder / "base" if args.delta else None,
    )
    before, started = peak_bytes(), time.perf_counter()
    conversion = convert(files, folder / "out", dtype=args.dtype, verify=args.verify)
    seconds = time.perf_counter() - started
    print(json.dumps([before, peak_bytes(), conversion.num_bytes, seconds]))


def main() -> None:
    """Write the files, convert them in another process, and show the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--layers", type=int, default=8, help="of the language model, 386 MiB each")
    parser.add_argument("--shards", type=int, default=2, help="files of the language model")
    parser.add_argument("--query-layers", type=int, default=4, help="of the Q-Former")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"],
        help="of all weights; without it each keeps its own",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="also with --verify")
    parser.add_argument("--delta", action="store_true", help="a delta, and a base it is added to")
    parser.add_argument("--v2", action="store_true", help="MiniGPT-v2, whose adapters are merged")
    parser.add_argument("--legacy", action="store_true", help="shards from before torch's zips")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work_dir / "published"
    if args.measure:
        measure(folder, args)
        return
    try:
        write_published(folder, args)
        command = [sys.executable, __file__, "--measure", *sys.argv[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        largest = max(
            path.stat().st_size for path in folder.glob("**/*") if "out" not in path.parts
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    before, peak, num_bytes, seconds = json.loads(done.stdout)
    flags = f" --dtype {args.dtype}" if args.dtype else ""
    flags += " --verify" if args.verify else ""
    flags += " --base" if args.delta else ""
    flags += " (MiniGPT-v2)" if args.v2 else ""
    table = Table("what", "size", title=f"minigpt4 convert{flags}: {seconds:.0f} s")
    table.add_row("weights written", show_bytes(num_bytes))
    table.add_row("largest published file", show_bytes(largest))
    table.add_row("memory after the imports", show_bytes(before))
    table.add_row("peak memory", show_bytes(peak))
    table.add_row("allowed: largest file + 1 GiB", show_bytes(largest + GIB))
    Console().print(table)
    if peak > largest + GIB:
        sys.exit("The promise is broken.")


if __name__ == "__main__":
    main()
