"""`minigpt4 fetch`: from a model's name to a described picture."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.convert import DType, Weights, byte_bar
from minigpt4_runtime.cli.options import FormatOptions, flag, option, spread_options
from minigpt4_runtime.cli.terminal import note, open_bars
from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from minigpt4_runtime.checkpoint.sources import ModelSources
    from minigpt4_runtime.config import ModelConfig
    from minigpt4_runtime.formats.registry import FormatChoice
    from minigpt4_runtime.hub.fetch import FileProgress
    from minigpt4_runtime.hub.fetch_plan import FetchPlan

EXAMPLE_PATH = Path(__file__).parents[1] / "assets" / "example.png"
_EXAMPLE_TOKENS = 60
# The width of a download's line beside its title: a bar, bytes, bytes a second, time left.
_BAR_CHARACTERS = 10
_COLUMNS_OF_NUMBERS = 50
# The width of the bytes alone, for narrow terminals.
_COLUMNS_OF_BYTES = 20
_FEWEST_TITLE_CHARACTERS = 12


@spread_options
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="vicuna-7b, vicuna-13b, llama2-7b, minigpt-v2, or one of --sources.",
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        option("DIR", "The model folder to make, instead of one in the cache.", "--out"),
    ] = None,
    keep_sources: Annotated[
        bool, flag("Keep the downloaded files in the cache.", "--keep-sources")
    ] = False,
    dtype: DType = None,
    weights: Weights = None,
    options: FormatOptions,
    dry_run: Annotated[
        bool, flag("Say what would come from where, and what it would take.", "--dry-run")
    ] = False,
    sources: Annotated[
        Path | None,
        option(
            "FILE",
            "Your own table of sources: its entries take the place of those of the same name in "
            "checkpoint/sources.toml.",
            "--sources",
        ),
    ] = None,
    from_dir: Annotated[
        Path | None,
        option(
            "DIR",
            "Use the published files that lie in or below DIR, whatever they are called there.",
            "--from",
        ),
    ] = None,
    no_example: Annotated[
        bool, flag("Do not describe a picture at the end.", "--no-example")
    ] = False,
) -> None:
    """Download a published model, convert it, and try it on a picture.

    The model can then be given by its name: --model NAME, or NAME-FORMAT with --format. What was
    downloaded when the command is stopped is kept: the same command goes on from there.
    MINIGPT4_HOME moves the cache, HF_ENDPOINT names a mirror of the Hugging Face Hub, HF_TOKEN
    opens repositories that ask for a licence, and HTTPS_PROXY is honoured.
    """
    from minigpt4_runtime.checkpoint.manifest import MANIFEST_NAME
    from minigpt4_runtime.checkpoint.shelf import measure, models_dir
    from minigpt4_runtime.checkpoint.sizes import running_bytes
    from minigpt4_runtime.checkpoint.sources import read_sources
    from minigpt4_runtime.hub.fetch_plan import choose_dtype

    known = read_sources(sources)
    if name not in known:
        raise ConfigError(f"There is no model {name!r} to fetch; there is {', '.join(known)}.")
    choose_formats = options.choice(weights)
    shelf_name = name if weights is None else f"{name}-{weights}"
    out_dir = out or models_dir() / shelf_name
    if (out_dir / MANIFEST_NAME).is_file():
        _check_present(known[name], out_dir, dtype, choose_formats)
        note(f"{shelf_name} is in {out_dir} already.")
        preset = known[name].preset
        half_bytes = running_bytes(preset, "float16") if preset else measure(out_dir)
        answer_dtype = choose_dtype(half_bytes)
    else:
        answer_dtype = _make(
            known[name],
            out_dir,
            from_dir=from_dir,
            dtype=dtype,
            choose_formats=choose_formats,
            keep_sources=keep_sources,
            dry_run=dry_run,
            will_answer=not no_example,
        )
    if not dry_run:
        print(out_dir, flush=True)
        if not no_example:
            _describe_example(out_dir, answer_dtype)
        flag = "" if answer_dtype == "float32" else f" --dtype {answer_dtype}"
        shown_as = shlex.quote(shelf_name if out is None else str(out))
        note(f"Now yours: minigpt4 describe photo.jpg --model {shown_as}{flag}")


def _check_present(
    model: ModelSources,
    out_dir: Path,
    dtype: DTypeName | None,
    choose_formats: Callable[[ModelConfig], FormatChoice] | None,
) -> None:
    """Check that the existing folder is the wanted model in the wanted dtype and formats."""
    from minigpt4_runtime.checkpoint.config_file import load_config
    from minigpt4_runtime.checkpoint.manifest import read_manifest
    from minigpt4_runtime.checkpoint.shelf import models_dir
    from minigpt4_runtime.convert.expected import check_preset
    from minigpt4_runtime.formats.registry import show_formats

    if model.preset is not None:
        try:
            check_preset(out_dir, load_config(out_dir), model.preset)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Choose another --out.") from None
    manifest, stored = read_manifest(out_dir), read_manifest(out_dir).dtypes
    wanted = choose_formats(load_config(out_dir)) if choose_formats else "float"
    if manifest.weight_format != wanted:
        raise ConfigError(
            f"{out_dir} is there already, as {show_formats(manifest.weight_format)} and not as "
            f"{show_formats(wanted)}. Choose another --out."
        )
    if dtype is not None and choose_formats is None and stored != (dtype,):
        is_shelved = out_dir.resolve() == (models_dir() / model.name).resolve()
        remedy = (
            f"Run `minigpt4 models --delete {model.name}` first, or choose"
            if is_shelved
            else "Choose"
        )
        raise ConfigError(
            f"{out_dir} is there already, stored in {' and '.join(stored)} and not in {dtype} "
            f"alone. {remedy} another --out."
        )


def _make(
    model: ModelSources,
    out_dir: Path,
    *,
    from_dir: Path | None,
    dtype: DTypeName | None,
    choose_formats: Callable[[ModelConfig], FormatChoice] | None,
    keep_sources: bool,
    dry_run: bool,
    will_answer: bool,
) -> DTypeName:
    """Fetch and convert, and say in which dtype the model can answer here."""
    from minigpt4_runtime.hub.fetch import cache_lock
    from minigpt4_runtime.hub.fetch_plan import check_room, choose_dtype, make_plan

    with cache_lock():
        note("Looking for the files …")
        plan = make_plan(
            model, out_dir=out_dir, from_dir=from_dir, dtype=dtype, choose_formats=choose_formats,
            say=note,
        )  # fmt: skip
        _show_plan(plan, is_all=dry_run)
        check_room(plan, will_answer=will_answer)
        answer_dtype = choose_dtype(plan.smallest_running_bytes)
        if not dry_run:
            _bring_and_convert(plan, keep_sources=keep_sources)
    return answer_dtype


def _bring_and_convert(plan: FetchPlan, *, keep_sources: bool) -> None:
    from minigpt4_runtime.convert.convert import convert
    from minigpt4_runtime.hub import fetch as hub

    try:
        with _file_bars(plan) as progress:
            hub.bring_files(plan, progress, note)
        with hub.assembled(plan) as files, byte_bar() as bar:
            conversion = convert(
                files, plan.out_dir, dtype=plan.dtype, choose_formats=plan.choose_formats,
                progress=bar, warn=note,
            )  # fmt: skip
    except KeyboardInterrupt:
        note("Stopped. What has come is kept: the same command goes on from there.")
        raise
    for stranger in hub.name_strangers(plan, conversion.manifest.sources):
        note(f"Not the published file, though of its form: {stranger}. Answers may be others.")
    if not keep_sources:
        hub.discard_sources(plan)


def _show_plan(plan: FetchPlan, *, is_all: bool) -> None:
    """Show the plan on stderr; all of it, on stdout, for a dry run."""
    from minigpt4_runtime.checkpoint.weights import show_bytes

    say = print if is_all else note
    if is_all:
        for part, found in plan.local.items():
            for file_name, path in found.files.items():
                say(f"{part.role:10}  {file_name}: {path}")
        for each in plan.files:
            size = "size unknown" if each.size is None else show_bytes(each.size)
            kept = f", {show_bytes(each.kept_bytes)} of it are here" if each.kept_bytes else ""
            say(f"{each.part.role:10}  {each.file.name}: {each.host}, {size}{kept}")
    for part in plan.model.parts:
        say(f"{part.what}. Licence: {part.licence}.")
    if plan.is_size_known:
        say(f"To download: {show_bytes(plan.download_bytes)}.")
    else:
        hosts = " and ".join(sorted({each.host for each in plan.files if each.size is None}))
        say(f"To download: more than can be said. {hosts} did not answer, or told no size.")
    if plan.is_size_known or plan.model.preset is not None:
        say(f"The model folder takes up to {show_bytes(plan.model_bytes)}: {plan.out_dir}")
    else:
        say(f"The model folder: {plan.out_dir}")


def _describe_example(model_dir: Path, dtype: DTypeName) -> None:
    """Describe the bundled example picture, printing the words as they come."""
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.config import SamplingParams
    from minigpt4_runtime.messages import Message, image
    from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

    note(f"An example, {EXAMPLE_PATH}:")
    model = MiniGPT4.load(model_dir, dtype=dtype)
    question = Message("user", (image(EXAMPLE_PATH), DESCRIBE_PROMPT))
    for delta in model.stream([question], SamplingParams(max_new_tokens=_EXAMPLE_TOKENS)):
        print(delta.text, end="", flush=True)
    print(flush=True)


@contextmanager
def _file_bars(plan: FetchPlan) -> Iterator[FileProgress]:
    """A bar on stderr for each running download, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [
        TextColumn("{task.description}"), BarColumn(_BAR_CHARACTERS),
        DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    width = Console(stderr=True).width
    room = width - _COLUMNS_OF_NUMBERS
    if room < _FEWEST_TITLE_CHARACTERS:
        columns, room = [columns[0], columns[2]], max(1, width - _COLUMNS_OF_BYTES)
    with open_bars(*columns) as bars:
        tasks = {
            # The end of a name tells the parts of a model apart.
            title: bars.add_task(
                title if len(title) <= room else f"…{title[1 - room :]}", total=size, visible=False
            )
            for title, size in ((each.title, each.size) for each in plan.files)
        }

        def show(title: str, num_bytes: int, total_bytes: int | None) -> None:
            bars.update(tasks[title], advance=num_bytes, total=total_bytes, visible=True)

        yield show
