"""`minigpt4 bench`: how fast the image side, the language model and the whole job are here."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from minigpt4_runtime.batch.finding import find_images, is_folder
from minigpt4_runtime.cli.options import (
    THREADS_VARIABLE,
    ModelOptions,
    SamplingOptions,
    flag,
    option,
    spread_options,
)
from minigpt4_runtime.cli.terminal import note, show_report
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.bench.report import BenchRun

DEFAULT_LATENCY_MS = 50.0

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def bench_group() -> None:
    """Measure speed: image side, language model, the whole job.

    The table goes to stdout. If a run is broken off, its measurements so far are shown.
    """


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """A shape in place of a model folder."""

    preset: Annotated[
        str | None,
        option(
            "NAME",
            "Measure the shape of vicuna-7b, vicuna-13b, llama2-7b or minigpt-v2, without its "
            "weights: with --random-weights, in place of --model.",
        ),
    ] = None
    random_weights: Annotated[
        bool, flag("With --preset: make its weights up in memory.", "--random-weights")
    ] = False
    layers: Annotated[
        int | None,
        option("COUNT", "With --preset: at most so many layers of each part.", min=1),
    ] = None

    def check(self, where: ModelOptions) -> None:
        """Refuse conflicting options.

        Raises:
            ConfigError: a preset beside a folder or without --random-weights, or the reverse.
        """
        if self.preset is None and (self.random_weights or self.layers is not None):
            raise ConfigError("--random-weights and --layers belong to --preset NAME. Add it.")
        if self.preset is not None and where.model is not None:
            raise ConfigError("--preset is a shape and --model a folder: give one of them.")
        if self.preset is not None and not self.random_weights:
            raise ConfigError(
                f"--preset {self.preset} has no weights. Add --random-weights, or measure a folder "
                "with --model DIR."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The folder of the report, and an older report to compare with."""

    out: Annotated[
        Path | None,
        option(
            "DIR",
            "Write into this folder: a page with plots (.html), everything (.json), and a row "
            "for each point (.csv).",
        ),
    ] = None
    compare: Annotated[
        Path | None,
        option(
            "OLD.json",
            "Show what changed since an older report (.json), beside the noise of both runs.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        option(
            "COUNT",
            "CPU threads. Without it OMP_NUM_THREADS, else torch's own choice; one for the "
            "demo model.",
            min=1,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search for the largest batch."""

    ramp_up: Annotated[
        bool,
        flag(
            "Find the largest batch whose later tokens come fast enough, for each pair.",
            "--ramp-up",
        ),
    ] = False
    batch_range: Annotated[
        str | None,
        option("FROM:TO", "With --ramp-up: the batch sizes to search, 1:256 without it."),
    ] = None
    max_token_latency_ms: Annotated[
        float | None,
        option(
            "MS", "With --ramp-up: the most that a later token may take in the mean, 50 without it."
        ),
    ] = None

    def read(self, batch_sizes: str | None) -> tuple[tuple[int, int], float]:
        """The smallest and the largest batch to try, and the limit in ms.

        Raises:
            ConfigError: options conflict, or a value is not valid.
        """
        limit = self.max_token_latency_ms
        if not self.ramp_up and (self.batch_range is not None or limit is not None):
            raise ConfigError(
                "--batch-range and --max-token-latency-ms belong to --ramp-up. Add it."
            )
        if self.ramp_up and batch_sizes is not None:
            raise ConfigError("--ramp-up searches --batch-range: drop --batch-sizes.")
        if limit is not None and not limit > 0:
            raise ConfigError(f"--max-token-latency-ms is {limit:g}; it must be above 0.")
        return _pair("--batch-range", self.batch_range or "1:256", ":"), limit or DEFAULT_LATENCY_MS


BatchSizes = Annotated[str, option("COUNTS", "Batch sizes, with commas between them.")]
Repeats = Annotated[int, option("COUNT", "How often each point is measured.", min=1)]


@bench.command()
@spread_options
def vision(
    *,
    images: Annotated[
        list[Path] | None,
        option("PATH", "Pictures and folders of pictures; a made-up photo without it."),
    ] = None,
    batch_sizes: BatchSizes = "1,2,4,8",
    repeats: Repeats = 10,
    where: ModelOptions,
    shape: PresetOptions,
    report: ReportOptions,
) -> None:
    """Measure how fast pictures become the language model's rows.

    Cold is the first picture after loading; then each batch size is measured warm. All times are
    for one picture: reading the file, resizing, image tower, projection. With --vision-graph,
    torch and each graph in that folder stand side by side; --vision-runtime measures one alone.
    """
    sizes = _sizes(batch_sizes)
    found = find_images(images, recursive=False) if images else None
    runtimes = _runtimes(where, shape)
    with _reported("bench vision", report) as run:
        from minigpt4_runtime.bench.vision import made_up_photo, measure_runtimes

        measure_runtimes(
            run, runtimes, found or [made_up_photo()],
            name=_name(where, shape), batch_sizes=sizes, repeats=repeats,
        )  # fmt: skip


@bench.command()
@spread_options
def language(
    *,
    batch_sizes: Annotated[
        str | None,
        option("COUNTS", "Batch sizes, with commas between them; 1 without it."),
    ] = None,
    pair: Annotated[
        list[str] | None,
        option(
            "INPUT,OUTPUT",
            "Tokens of each prompt and of each answer; may be given several times. Without "
            "it 256,64 512,128 1024,256 and 3584,512, as far as they fit into the model's context.",
        ),
    ] = None,
    repeats: Repeats = 3,
    search: SearchOptions,
    where: ModelOptions,
    shape: PresetOptions,
    report: ReportOptions,
) -> None:
    """Measure how fast answers grow, from prompts of random ids.

    For each batch size and pair of lengths: response time, time of the first and of each later
    token, tokens a second, and how much of the measured memory bandwidth that takes. Each answer
    runs to its full length.
    """
    first_last, limit = search.read(batch_sizes)
    pairs = [_pair("--pair", text, ",") for text in pair or ()]
    sizes = _sizes("1" if batch_sizes is None else batch_sizes)
    load = _loader(where, shape, vision=1, language=shape.layers)
    with _reported("bench language", report) as run:
        from minigpt4_runtime.bench.language import LanguageBench, Work

        measuring = LanguageBench(run.load(load, name=_name(where, shape)), repeats=repeats)

        for lengths in measuring.fitting(pairs, run.notes):
            if search.ramp_up:
                found = measuring.search(
                    lengths, first_last, max_token_latency_ms=limit, on_tried=run.add
                )
                run.searches.append(found)
                note(found.as_text())
            else:
                for size in sizes:
                    run.add(measuring.measure(Work(size, *lengths)))


@bench.command()
@spread_options
def describe(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of pictures.")],
    *,
    prompt: Annotated[str, option("TEXT", "What to ask about each picture.")] = DESCRIBE_PROMPT,
    repeats: Repeats = 1,
    where: ModelOptions,
    shape: PresetOptions,
    sampling: SamplingOptions,
    report: ReportOptions,
) -> None:
    """Measure the whole job: the pictures of a folder, described.

    With 1, 2, 4 … and all pictures in turn. Nothing that one run has computed is left for the next.
    Pictures that cannot be read are named and count in no rate; the exit status is then 1.
    """
    params = sampling.params()
    if not is_folder(folder):
        raise ConfigError(f"{folder} is no folder. Name one with pictures.")
    images = find_images([folder], recursive=False, with_unreadable=True)
    load = _loader(where, shape, vision=shape.layers, language=shape.layers)
    with _reported("bench describe", report) as run:
        from minigpt4_runtime.bench.describe import measure_describe

        model = run.load(load, name=_name(where, shape))
        for measured in measure_describe(model, images, prompt, params, repeats=repeats):
            run.add(measured)
            run.notes += [f"Not described: {error}" for error in measured.failures.values()]
    if measured.failures:
        raise typer.Exit(1)


# --- shared by the commands -------------------------------------------------------------------


@contextmanager
def _reported(kind: str, options: ReportOptions) -> Iterator[BenchRun]:
    """Check the report's options; at any end, report the measurements so far."""
    from minigpt4_runtime.bench.comparison import read_report
    from minigpt4_runtime.bench.report import BenchRun
    from minigpt4_runtime.report.files import ReportFolder

    old = read_report(options.compare, kind) if options.compare is not None else None
    folder = ReportFolder.open(options.out, kind.replace(" ", "-"))
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
        os.environ[THREADS_VARIABLE] = str(options.threads)  # Loading keeps an explicit choice.
    run = BenchRun(kind, command=shlex.join(["minigpt4", *sys.argv[1:]]), tell=note)
    try:
        yield run
    except BaseException:
        run.notes.append("The run was broken off here: the rest was not measured.")
        raise
    finally:
        if run.measured:
            show_report(run.report(old), folder)


def _loader(
    where: ModelOptions, shape: PresetOptions, *, vision: int | None, language: int | None
) -> Callable[[], MiniGPT4]:
    """A function that makes the model, from a folder or with random weights and few layers."""
    shape.check(where)
    if shape.preset is None:
        return partial(where.load, announce_demo=False)  # The report says what is measured.
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.bench.presets import cut_layers, find_preset

    config = cut_layers(find_preset(shape.preset), vision=vision, language=language)
    stretched = config.language.stretched(where.rope_scaling, where.max_context)
    config = replace(config, language=stretched)
    return lambda: MiniGPT4.with_random_weights(
        config,
        device=where.device,
        dtype=cast(Any, where.dtype),
        engine=where.engine(),
        tensor_parallel=where.tensor_parallel,
    )


def _runtimes(where: ModelOptions, shape: PresetOptions) -> dict[str, Callable[[], MiniGPT4]]:
    """Each runtime of the image side and its loader: all of them, unless one is named."""
    if shape.preset is not None and where.vision_graph is not None:
        raise ConfigError("--vision-graph was made of a folder's weights; a --preset has none.")
    if where.vision_runtime != "auto" or where.vision_graph is None:
        name = "torch" if where.vision_runtime == "auto" else where.vision_runtime
        return {name: _loader(where, shape, vision=shape.layers, language=1)}
    from minigpt4_runtime.checkpoint.graph_folder import runtimes_of

    torch = replace(where, vision_runtime="torch", vision_graph=None, provider=None)
    runtimes = {"torch": _loader(torch, shape, vision=None, language=None)}
    for name in runtimes_of(where.vision_graph):
        provider = where.provider if name == "onnx" else None
        runtime = replace(where, vision_runtime=name, provider=provider)
        runtimes[name] = _loader(runtime, shape, vision=None, language=None)
    return runtimes


def _name(where: ModelOptions, shape: PresetOptions) -> str:
    if shape.preset is None:
        return str(where.model or "the demo model")
    layers = f", {shape.layers} layers" if shape.layers is not None else ""
    return f"{shape.preset} with random weights{layers}"


def _sizes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"--batch-sizes is {text!r}; give whole numbers with commas: 1,2,4.")
    return tuple(dict.fromkeys(map(int, text.split(","))))


_PAIRS = {
    "--pair": "tokens of prompt and answer: 256,64",
    "--batch-range": "the smallest and the largest: 1:256",
}


def _pair(option: str, text: str, between: str) -> tuple[int, int]:
    numbers = re.fullmatch(rf"([1-9]\d*){between}([1-9]\d*)", text)
    if numbers is None or (between == ":" and int(numbers[1]) > int(numbers[2])):
        raise ConfigError(f"{option} is {text!r}; give {_PAIRS[option]}.")
    return int(numbers[1]), int(numbers[2])
