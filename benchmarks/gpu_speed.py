"""The parts of benchmarks/gpu.py that measure speed: language, vision, profile, compiled.

Owns   the measured shapes, and one decode step that can be timed, profiled and captured.
Takes  a Setting. In a dry run the shapes are the demo model's or smaller.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from engine import Work, cost, decode_rate, prefill_rate
from gpu_results import (
    Results,
    Setting,
    UnavailableError,
    as_graph,
    median_seconds,
    one_by_one,
)
from rivals import Ours, TimedAnswers, Transformers, wide_config
from torch import Tensor

from minigpt4_runtime import Message, MiniGPT4, SamplingParams, image
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.bench.costs import vision_gigaflops
from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.checkpoint.blank_model import Where, blank_for, blank_model, model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.config import DTypeName, EngineConfig, ModelConfig
from minigpt4_runtime.devices.contracts import DeviceBackend
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine.drawing import TORCH_CHOICE
from minigpt4_runtime.engine.plan import Slice, StepPlan
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.kernels.registry import (
    bind_attention,
    linear_kernel,
    row_choice,
    row_operations,
)
from minigpt4_runtime.model.llama import Attend, Llama
from minigpt4_runtime.optional import require
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.vision.contracts import VisionEncoder
from minigpt4_runtime.vision.registry import vision_encoder

SHOWN_KERNELS = 25
CONTEXT = 300  # Tokens of each sequence of a decode step: a picture, a question, half an answer.
BLOCK_SIZE = EngineConfig.block_size
QUESTION = "Describe this image in detail."
COMPILED_LAYERS = 8  # Compiling all 32 takes longer than the part has.
_CLOSE = 0.02  # Largest difference of logits, as a share of the largest, between two ways.


# --- language -------------------------------------------------------------------------------------

Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], TimedAnswers]


def language(setting: Setting, results: Results) -> None:
    """The engine and transformers on the same weights: tokens per second of each repeat."""
    config = None if setting.is_dry else wide_config(32)
    dtype: DTypeName = "float32" if setting.is_dry else "float16"
    # The rest of the memory is for transformers' own cache.
    num_blocks = 64 if setting.is_dry else 64 * 448 // BLOCK_SIZE
    ours = Ours(config, device=str(setting.device), dtype=dtype, num_blocks=num_blocks)
    theirs: list[Transformers] = []

    def assemble() -> dict[str, object]:
        theirs.append(Transformers(ours.language))
        return {}

    results.attempt("transformers", assemble)
    works = language_works(is_dry=setting.is_dry)
    for work in works:
        compare(work, ours, theirs[0] if theirs else None, setting, results)
    ours.use_engine(cuda_graphs="off")
    for work in works[:-1]:
        ask = partial(rates, work, ours.generate, ours, setting)
        results.attempt(f"{work.name}, without graphs", ask)
    ours.use_engine(max_step_tokens=2048)
    results.attempt("prefill in one step", partial(rates, works[-1], ours.generate, ours, setting))


def fallback(setting: Setting, results: Results) -> None:
    """Where `language` has no rate of its own: by torch alone, in a process without its errors."""
    path = results.folder / "language.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else []
    if any("rates" in each and "transformers" not in each["name"] for each in found):
        results.add("by torch alone", unavailable="not needed: the part language has rates")
        return
    from minigpt4_runtime.devices import cuda
    from minigpt4_runtime.kernels import registry

    for module in (cuda, registry):
        vars(module)["runs_triton"] = lambda capability: False  # noqa: ARG005
    config = None if setting.is_dry else wide_config(32)
    dtype: DTypeName = "float32" if setting.is_dry else "float16"
    ours = Ours(
        config, device=str(setting.device), dtype=dtype, num_blocks=64 if setting.is_dry else 1800
    )
    for graphs in ("auto", "off"):
        ours.use_engine(cuda_graphs=graphs)
        for work in language_works(is_dry=setting.is_dry):
            name = f"{work.name}, by torch alone, graphs {graphs}"
            results.attempt(name, partial(rates, work, ours.generate, ours, setting))


def rival(setting: Setting, results: Results) -> None:
    """Decode beside transformers with a fixed cache: of few layers, to be compiled in time."""
    config = None if setting.is_dry else wide_config(COMPILED_LAYERS)
    dtype: DTypeName = "float32" if setting.is_dry else "float16"
    num_blocks = 64 if setting.is_dry else 64 * 448 // BLOCK_SIZE
    ours = Ours(config, device=str(setting.device), dtype=dtype, num_blocks=num_blocks)
    decodes = [work for work in language_works(is_dry=setting.is_dry) if work.is_decode]
    # To compile takes so long that the first one may be the only one: it is what the report wants.
    works = (decodes[-1], decodes[0])
    for work in works:
        results.attempt(work.name, partial(rates, work, ours.generate, ours, setting))
    # On a CPU compiling takes a minute, which a dry run does not need.
    for kind in ("static",) if setting.is_dry else ("static", "compiled"):
        for work in works:
            results.attempt(f"{work.name}, {kind}", partial(theirs_in, kind, work, ours, setting))


def theirs_in(kind: str, work: Work, ours: Ours, setting: Setting) -> dict[str, Any]:
    """The rates of transformers with such a cache."""
    generate = partial(Transformers(ours.language, kind).generate, batch_size=work.batch_size)
    return rates(work, generate, ours, setting)


def compare(
    work: Work, ours: Ours, theirs: Transformers | None, setting: Setting, results: Results
) -> None:
    """Measure one side after the other: an error of one does not lose the other's rate."""
    said: list[TimedAnswers] = []
    ask_ours = partial(rates, work, ours.generate, ours, setting, said)
    results.attempt(work.name, ask_ours)
    if theirs is not None:
        generate = partial(theirs.generate, batch_size=work.batch_size)
        ask_theirs = partial(rates, work, generate, ours, setting, said)
        results.attempt(f"{work.name}, transformers", ask_theirs)
    if len(said) == 2:
        results.add(f"{work.name}, agreement", tokens=common_beginning(*said))


def rates(
    work: Work, generate: Generate, ours: Ours, setting: Setting,
    said: list[TimedAnswers] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Rates, and the least cost of a token in GB read or in GFLOP."""
    found = []
    for repeat in range(-1, 1 if setting.is_dry else 3):  # The first one warms up.
        prompts = work.prompts(ours.language.config.vocab_size, repeat)
        answered = generate(prompts, work.counts)
        found.append(work.rate(answered, work))
    if said is not None:
        said.append(answered)
    return {"rates": found[1:], "cost": cost(work, ours.language), "unit": work.unit}


def common_beginning(ours: TimedAnswers, theirs: TimedAnswers) -> float:
    """How many tokens of an answer are equal on both sides before the first difference."""
    return statistics.median(
        next((i for i, (a, b) in enumerate(zip(mine, yours, strict=True)) if a != b), len(mine))
        for mine, yours in zip(ours.token_ids, theirs.token_ids, strict=True)
    )


def language_works(*, is_dry: bool) -> list[Work]:
    """Prompts of 300 tokens, as with a picture, and answers of 128; and one long prompt."""
    if is_dry:
        return [
            Work("decode1", [8], [4], decode_rate, 1),
            Work("decode4", [8] * 4, [6] * 4, decode_rate, 4),
            Work("prefill", [32], [1], prefill_rate, 1),
        ]
    decodes = [
        Work(f"decode{count}", [300] * count, [128] * count, decode_rate, count)
        for count in (1, 8, 64)
    ]
    return [*decodes, Work("prefill", [1920], [1], prefill_rate, 1)]


# --- vision ---------------------------------------------------------------------------------------


def vision(setting: Setting, results: Results) -> None:
    """The image side at full depth: milliseconds from pixels in memory to rows on the device."""
    config = picture_config(setting)
    dtypes: list[DTypeName] = ["float32"] if setting.is_dry else ["float16", "bfloat16"]
    for dtype in dtypes:
        captured_encoder = random_encoder(config, setting.device, dtype, as_graph=True)
        time_encoder(f"torch as a graph {dtype}", captured_encoder, setting, results)
        encoder = random_encoder(config, setting.device, dtype)
        time_encoder(f"torch {dtype}", encoder, setting, results)
        torch.backends.cuda.enable_cudnn_sdp(True)
        time_encoder(f"torch with cuDNN's attention {dtype}", encoder, setting, results)
        torch.backends.cuda.enable_cudnn_sdp(False)
    facts = open_device(str(setting.device)).facts
    for formats in ("w8a8", *(("w8a8-fp8",) if facts.has_float8 else ())):
        ask = partial(quantised_encoder, config, formats, setting, results)
        results.attempt(f"torch as a graph {formats}", ask)
    name = "ONNX Runtime float32"
    try:
        with compiled_encoder(setting) as encoder:
            time_encoder(name, encoder, setting, results)
    except UnavailableError as reason:
        results.add(name, unavailable=str(reason))


def time_encoder(name: str, encoder: VisionEncoder, setting: Setting, results: Results) -> None:
    """Time one image, and many at once."""
    for count in (1, 2) if setting.is_dry else (1, 16):
        results.attempt(f"{name}, {count}", partial(time_pictures, encoder, count, setting))


def picture_config(setting: Setting) -> ModelConfig:
    """The published image side, or the demo model's."""
    return load_config(DEMO_MODEL_DIR) if setting.is_dry else PRESETS["vicuna-7b"]


def quantised_encoder(
    config: ModelConfig, formats: str, setting: Setting, results: Results
) -> dict[str, object]:
    """Time the image side in a format of 8 bits."""
    dtype: DTypeName = "float32" if setting.is_dry else "float16"
    encoder = random_encoder(config, setting.device, dtype, as_graph=True, formats=formats)
    time_encoder(f"torch as a graph {formats}", encoder, setting, results)
    return {}


def random_encoder(
    config: ModelConfig,
    device: torch.device,
    dtype: DTypeName,
    *,
    as_graph: bool = False,
    formats: str = "float",
) -> VisionEncoder:
    """The image side in torch, with random weights, as it is loaded."""
    backend = open_device(str(device))
    where = as_loaded(backend, getattr(torch, dtype))
    part = fill_at_random(blank_for(where, config, {"vision": formats}).vision, **where)
    return vision_encoder("torch")(part, capture=backend.capture if as_graph else None)


def as_loaded(backend: DeviceBackend, dtype: torch.dtype) -> Where:
    """The kernels and the joint weights that a model has when it is loaded on a device."""
    return Where(
        device=backend.device, dtype=dtype, operations=row_operations(backend.device),
        kernel_of=partial(linear_kernel, device=backend.device, widen_from=None),
        joins=backend.facts.joins,
    )  # fmt: skip


def time_pictures(encoder: VisionEncoder, count: int, setting: Setting) -> dict[str, float]:
    """Encode random pictures."""
    config = picture_config(setting)
    size = config.vision.image_size
    pixels = torch.randn(count, 3, size, size)
    repeats = 2 if setting.is_dry else 20
    seconds = median_seconds(lambda: encoder.encode(pixels), setting.device, repeats=repeats)
    gigaflops = count * vision_gigaflops(config)
    return {
        "pictures": count, "milliseconds": 1e3 * seconds,
        "teraflops_per_second": gigaflops / seconds / 1e3,
    }  # fmt: skip


@contextmanager
def compiled_encoder(setting: Setting) -> Iterator[VisionEncoder]:
    """The same as a graph in ONNX Runtime on the GPU, exported first."""
    try:
        runtime = require("onnxruntime", install="pip install onnxruntime-gpu")
    except BackendUnavailableError as error:
        raise UnavailableError(str(error)) from None
    provider, there = setting.device.type, runtime.get_available_providers()
    if f"{provider.upper()}ExecutionProvider" not in there:
        raise UnavailableError(f"this ONNX Runtime has only {', '.join(there)}")
    from minigpt4_runtime.export.onnx import GraphPlan, export_onnx

    with tempfile.TemporaryDirectory() as work_dir:
        model_dir, graph_dir = Path(work_dir, "model"), Path(work_dir, "graph")
        write_picture_model(model_dir, setting)
        export_onnx(model_dir, graph_dir, images=[], plan=GraphPlan(batch_sizes=None))
        yield vision_encoder("onnx")(
            graph_dir / "vision.onnx", None, device=setting.device, dtype=torch.float32,
            provider=provider,
        )  # fmt: skip


def write_picture_model(model_dir: Path, setting: Setting) -> None:
    """A model folder with the published image side; in a dry run one layer of the demo model's."""
    from load_memory import TOKENIZER
    from vision_export import RandomWeights, full_config

    from minigpt4_runtime.checkpoint.folder import write_folder

    config = full_config(PRESETS["vicuna-7b"].vision.num_hidden_layers)
    if setting.is_dry:
        demo = picture_config(setting)
        assert demo.qformer is not None
        config = replace(
            demo,
            vision=replace(demo.vision, num_hidden_layers=1),
            qformer=replace(demo.qformer, num_hidden_layers=1),
        )
    write_folder(model_dir, config, RandomWeights(model_shapes(config)), TOKENIZER)


# --- one picture ----------------------------------------------------------------------------------


def picture(setting: Setting, results: Results) -> None:
    """The time from a picture in memory to the first token about it."""
    for graphs in ("auto", "off"):
        engine = EngineConfig(cuda_graphs=graphs, num_blocks=64 if setting.is_dry else 2048)
        place: Any = {"device": str(setting.device), "engine": engine}
        with (
            MiniGPT4.load(dtype="float32", **place)
            if setting.is_dry
            else MiniGPT4.with_random_weights(PRESETS["vicuna-7b"], dtype="float16", **place)
        ) as model:
            name = "first token" + ("" if graphs == "auto" else ", without graphs")
            results.attempt(name, partial(first_tokens, model, setting))
            if graphs == "auto":
                results.attempt("many answers", partial(many_answers, model, setting))


def many_answers(model: MiniGPT4, setting: Setting) -> dict[str, float]:
    """Answers about pictures that are all new, from pictures in memory to the last token."""
    count, num_new = (2, 3) if setting.is_dry else (64, 128)
    # Random weights say anything, also what would end an answer.
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True, stop=())
    random = numpy.random.default_rng(1)
    for _ in range(2):  # The first time graphs are captured.
        said = 0
        pictures = random.integers(0, 256, (count, 224, 224, 3), numpy.uint8)
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:  # As a server opens pictures.
            asked = [[Message("user", (image(each), QUESTION))] for each in pictures]
            for ticket in list(pool.map(partial(model.submit, sampling=sampling), asked)):
                *_, last = ticket
                said += len(last.reply.token_ids) if last.reply else 0
        seconds = time.perf_counter() - started
    return {"answers": count, "tokens_per_second": said / seconds}


def first_tokens(model: MiniGPT4, setting: Setting) -> dict[str, float]:
    """The median over pictures that are all new; the first ones warm up."""
    random = numpy.random.default_rng(0)
    times = []
    for _ in range(3 if setting.is_dry else 13):
        pixels = random.integers(0, 256, (480, 640, 3), numpy.uint8)
        started = time.perf_counter()
        question = Message("user", (image(pixels), QUESTION))
        list(model.submit([question], SamplingParams(max_new_tokens=1, ignore_eos=True)))
        times.append(time.perf_counter() - started)
    return {"milliseconds": 1e3 * statistics.median(times[2:])}


# --- one decode step ------------------------------------------------------------------------------


class DecodeStep:
    """A decode step of a number of answers at CONTEXT tokens, with random keys and values."""

    def __init__(
        self, language: Llama, setting: Setting, *, batch: int, has_graphs: bool = True
    ) -> None:
        backend = open_device(str(setting.device))
        num_blocks = -(-CONTEXT // BLOCK_SIZE)
        bind = partial(bind_attention, backend.facts.attention)
        self._language = language
        self._choice = row_choice(setting.device) or TORCH_CHOICE
        self._runner = Runner(
            language, None, bind, config=EngineConfig(), num_blocks=batch * num_blocks,
            capture=backend.capture if has_graphs else None,
        )  # fmt: skip
        self._plan = StepPlan(
            tuple(
                Slice(
                    row,
                    0,
                    CONTEXT - 1,
                    (5,),
                    row,
                    0,
                    tuple(range(row * num_blocks, (row + 1) * num_blocks)),
                    num_sampled=1,
                )
                for row in range(batch)
            )
        )
        cache = self._runner._cache  # noqa: SLF001 - nothing else fills it without a prompt.
        assert isinstance(cache, FloatCache), "the default cache holds floats"
        cache.keys.normal_()
        cache.values.normal_()
        step = self._runner._buffers.load(self._plan)  # noqa: SLF001 - likewise.
        self._attend: Attend = self._runner._attention(step.batch)  # noqa: SLF001
        self._rows = torch.randn(batch, language.config.hidden_size, device=setting.device).to(
            language.token_embedding.weight.dtype
        )
        self._positions = torch.full((batch,), CONTEXT - 1, device=setting.device)

    def run(self) -> list[int]:
        """The whole step of the engine's thread between two plans, including sampling."""
        logits = self._runner.execute(self._plan, {})
        chosen: list[int] = self._choice.best(logits)[0].tolist()
        return chosen

    @torch.no_grad()  # torch.compile takes no views of tensors in inference mode.
    def compute(self) -> Tensor:
        """The model alone: rows → logits, without waiting for the device."""
        return self._language.logits(self._language(self._rows, self._positions, self._attend))


def random_language(setting: Setting, num_layers: int, *, is_plain: bool = False) -> Llama:
    """A language model of 7B's widths, or the demo model's: as it is loaded, or torch's alone."""
    config, dtype = wide_config(num_layers), torch.float16
    if setting.is_dry:
        config, dtype = load_config(DEMO_MODEL_DIR), torch.float32
        config = replace(config, language=replace(config.language, num_hidden_layers=1))
    where = as_loaded(open_device(str(setting.device)), dtype)
    if is_plain:
        where = Where(device=setting.device, dtype=dtype)
    return fill_at_random(blank_for(where, config, DENSE.name).language, **where)


# --- profile --------------------------------------------------------------------------------------


def profile(setting: Setting, results: Results) -> None:
    """Kernels and launch gaps of one decode step and of one picture."""
    profile_steps(setting, results)
    profile_picture(setting, results)


def profile_steps(setting: Setting, results: Results) -> None:
    """The whole step, as the engine's thread runs it."""
    model = random_language(setting, 32)
    for batch in (1, 2) if setting.is_dry else (1, 64):
        step = DecodeStep(model, setting, batch=batch)
        profiled(f"decode step of {batch}", step.run, setting, results)


def profile_picture(setting: Setting, results: Results) -> None:
    """From pixels in memory to rows on the device."""
    config = picture_config(setting)
    encoder = random_encoder(config, setting.device, "float32" if setting.is_dry else "float16")
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    profiled("one picture", lambda: encoder.encode(pixels), setting, results)


def profiled(name: str, compute: Callable[[], object], setting: Setting, results: Results) -> None:
    """Profile one run, and keep the device's events."""
    trace_path = results.folder / f"trace-{name.replace(' ', '-')}.json.gz"
    results.attempt(name, lambda: look_at(compute, setting, trace_path))


def look_at(compute: Callable[[], object], setting: Setting, trace_path: Path) -> dict[str, Any]:
    """Time `work` without the profiler, then run it once with the profiler."""
    repeats = 2 if setting.is_dry else 10
    seconds = median_seconds(compute, setting.device, repeats=repeats)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2):  # The first one starts the profiler's own libraries.
        with torch.profiler.profile(activities=activities) as profiler:
            compute()
            setting.synchronize()
    keep_trace(profiler, trace_path)
    wanted = setting.device.type.upper()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type.name == wanted
    ]
    return {"milliseconds": 1e3 * seconds, **busy_time(spans), "kernels": longest(spans)}


Span = tuple[float, float, str]  # Start and end in microseconds, and a name.


def busy_time(spans: Sequence[Span]) -> dict[str, float]:
    """The device's busy time, and its longest gap, in which it waited for a launch.

    The profiler makes gaps longer.
    """
    if not spans:
        raise RuntimeError("the profiler has seen nothing on the device")
    merged: list[list[float]] = []
    for start, end, _ in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    gaps = [after[0] - before[1] for before, after in pairwise(merged)]
    return {
        "operations": len(spans),
        "busy_ms": sum(end - start for start, end in merged) / 1e3,
        "longest_gap_ms": max(gaps, default=0.0) / 1e3,
    }


def longest(spans: Sequence[Span]) -> list[dict[str, object]]:
    """The kernels with the largest total time."""
    times: dict[str, list[float]] = {}
    for start, end, name in spans:
        times.setdefault(name, []).append(end - start)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {"kernel": name[:160], "calls": len(each), "ms": sum(each) / 1e3}
        for name, each in ranked[:SHOWN_KERNELS]
    ]


def keep_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a trace for chrome://tracing or ui.perfetto.dev."""
    with tempfile.NamedTemporaryFile(suffix=".json") as plain:
        profiler.export_chrome_trace(plain.name)
        with Path(plain.name).open("rb") as source, gzip.open(path, "wb") as target:
            shutil.copyfileobj(source, target)


# --- compiled -------------------------------------------------------------------------------------


def compiled(setting: Setting, results: Results) -> None:
    """Times of the engine's step, the model alone, a CUDA graph, and torch.compile."""
    compare_ways(random_language(setting, 32), 32, setting, results)
    compare_ways(random_language(setting, COMPILED_LAYERS), COMPILED_LAYERS, setting, results)
    model = random_language(setting, COMPILED_LAYERS, is_plain=True)
    for batch in (1,) if setting.is_dry else (1, 64):
        step = DecodeStep(model, setting, batch=batch)
        name = f"torch.compile, {COMPILED_LAYERS} layers, {batch}"
        results.attempt(name, partial(torch_compiled, step, setting))
    results.attempt("torch.compile, image side, 1", partial(picture_compiled, setting))


def compare_ways(model: Llama, num_layers: int, setting: Setting, results: Results) -> None:
    """Compare the ways to run one step of a model."""
    for batch in (1,) if setting.is_dry else (1, 8, 64):
        step = DecodeStep(model, setting, batch=batch)
        plain = DecodeStep(model, setting, batch=batch, has_graphs=False)
        ways: dict[str, Callable[[], Mapping[str, object]]] = {
            "engine": partial(timed, step.run, setting),
            "engine without graphs": partial(timed, plain.run, setting),
            "eager": partial(timed, step.compute, setting),
            "graph": partial(captured, step, setting),
            "graph without overlap": one_by_one()(partial(captured, step, setting)),
        }
        for way, measure_way in ways.items():
            results.attempt(f"{way}, {num_layers} layers, {batch}", measure_way)


def timed(compute: Callable[[], object], setting: Setting) -> dict[str, float]:
    """Milliseconds."""
    return {"milliseconds": 1e3 * median_seconds(compute, setting.device, repeats=20)}


def captured(step: DecodeStep, setting: Setting) -> dict[str, Any]:
    """One CUDA graph of the step's model, replayed."""
    capture = open_device(str(setting.device)).capture
    if capture is None:
        raise UnavailableError("CUDA graphs need a GPU")
    expected = step.compute().clone()
    replay = capture(step.compute)
    values: dict[str, Any] = timed(replay, setting)
    return {**values, "difference": check_close(replay(), expected)}


def torch_compiled(step: DecodeStep, setting: Setting) -> dict[str, Any]:
    """The step's model under torch.compile, unchanged."""
    expected = step.compute().clone()
    torch._dynamo.reset()  # noqa: SLF001 - compilations for other batches count against a limit.
    # On a CPU its code generator takes a minute, which a dry run does not need.
    backend = "eager" if setting.is_dry else "inductor"
    compute = torch.compile(step.compute, dynamic=False, backend=backend)
    first = median_seconds(compute, setting.device, repeats=1, warm_up=0)
    difference = check_close(compute(), expected)
    values: dict[str, Any] = timed(compute, setting)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())  # noqa: SLF001
    return {
        **values, "first_call_seconds": first, "graph_breaks": breaks, "difference": difference,
    }  # fmt: skip


@torch.no_grad()
def picture_compiled(setting: Setting) -> dict[str, Any]:
    """The whole image side for one picture, its blocks under torch.compile, as a graph.

    The part vision has the same without torch.compile. All blocks share what is compiled.
    """
    dtype = torch.float32 if setting.is_dry else torch.float16
    config = picture_config(setting)
    fill_at_random(part := blank_model(config).vision, device=setting.device, dtype=dtype)
    side = config.vision.image_size
    pixels = torch.randn(1, 3, side, side, device=setting.device).to(dtype)
    expected = part(pixels)
    torch._dynamo.reset()  # noqa: SLF001 - as above.
    for block in part.vit.blocks:
        block.compile(dynamic=False, backend="eager" if setting.is_dry else "inductor")
    started = time.perf_counter()
    difference = check_close(part(pixels), expected)
    first = time.perf_counter() - started
    values: dict[str, Any] = timed(as_graph(lambda: part(pixels), setting), setting)
    return {**values, "first_call_seconds": first, "difference": difference}


def check_close(logits: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value; an error if it is too large."""
    share = float((logits - expected).abs().max() / expected.abs().max())
    if not share <= _CLOSE:
        raise RuntimeError(f"the logits differ by {share:.3f} of the largest")
    return share
