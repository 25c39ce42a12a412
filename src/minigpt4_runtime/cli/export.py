"""`minigpt4 export`: a side of the model as files that other runtimes run."""

from __future__ import annotations

import random
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minigpt4_runtime.batch.finding import find_images
from minigpt4_runtime.cli.options import flag, option
from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import ImageSource, image

if TYPE_CHECKING:
    from minigpt4_runtime.checkpoint.graph_folder import GraphRecord

# The exit status if the graph was made, but not the .om.
HALF_DONE = 3
_NUM_SCENES = 4

export = typer.Typer(name="export", no_args_is_help=True, rich_markup_mode=None)


GraphFormat = Literal["onnx", "om"]
Batch = Literal["1", "dynamic"]


@export.callback()
def export_group() -> None:
    """Make files that other runtimes run."""


@export.command()
def vision(
    *,
    out: Annotated[Path, option("DIR", "The folder to make, with graph and record.")],
    model: Annotated[
        Path | None,
        option(
            "DIR",
            "A folder made by `minigpt4 convert`, or the name of a fetched model. Without it, the "
            "bundled demo model's.",
        ),
    ] = None,
    graph_format: Annotated[
        GraphFormat,
        typer.Option(
            "--format",
            help="onnx for ONNX Runtime; om for Ascend NPUs, which makes the ONNX file too and "
            "hands it to Ascend's compiler, atc.",
        ),
    ] = "onnx",
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="What it computes in. Pixels are float32 in both; rows are this."),
    ] = "float32",
    batch: Annotated[
        Batch | None,
        typer.Option(
            help="With onnx: one picture at a time, which is the default, or any number.",
            show_default=False,
        ),
    ] = None,
    soc_version: Annotated[
        str | None, option("CHIP", "With om: the chip, as in Ascend910B3.")
    ] = None,
    batch_sizes: Annotated[
        str | None,
        option(
            "SIZES",
            "With om: how many pictures the graph can take at once, as in 1,2,4,8. Without it, 1.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        option(
            "PATH",
            "Pictures or folders of them to compare the graph with torch on, beside random ones. "
            "Without it, four drawn scenes.",
            "--pictures",
        ),
    ] = None,
    force: Annotated[bool, flag("Replace the graph folder that --out names.", "--force")] = False,
) -> None:
    """Export the image side as one graph.

    It leads from pixels to the language model's rows. The graph is run beside torch before it gets
    its name; one whose rows differ too much is not kept, and neither is a half one. How far they
    differ stands in export.json. Use the folder with --vision-graph. Without atc on this machine,
    --format om leaves the ONNX file and the command for an Ascend host as atc.sh, and the exit
    status is 3.
    """
    sizes = _read_sizes(graph_format, batch, soc_version, batch_sizes)
    sources = _sources(images)
    from minigpt4_runtime.api import DEMO_MODEL_DIR
    from minigpt4_runtime.checkpoint.config_file import load_config
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.export.om import atc_command, compile_om
    from minigpt4_runtime.export.onnx import GraphPlan, export_onnx

    model_dir, command = find_model(model) if model else DEMO_MODEL_DIR, []
    if sizes and soc_version:
        image_side = load_config(model_dir).vision
        command = atc_command(image_side, soc_version=soc_version, batch_sizes=sizes)
    is_any = batch == "dynamic" or (sizes is not None and len(sizes) > 1)
    plan = GraphPlan(
        dtype=dtype,
        batch_sizes=None if is_any else sizes or (1,),
        om_batch_sizes=sizes,
    )
    note("Exporting: this takes some seconds, and minutes for the published models.")
    try:
        record = export_onnx(model_dir, out, images=sources, plan=plan, force=force)
    except KeyboardInterrupt:
        note("Stopped. No half graph was left behind.")
        raise
    _report(record)
    is_done = not command or compile_om(out, command)
    print(out, flush=True)
    if not is_done:
        note(
            "There is no atc on the PATH, so there is no .om yet. On an Ascend host run "
            f"{out / 'atc.sh'}, which is:\n{shlex.join(command)}"
        )
        raise typer.Exit(HALF_DONE)
    options = [*(["--model", str(model)] if model else []), "--vision-graph", str(out)]
    note(f"Try it: minigpt4 describe PICTURE {shlex.join(options)}")


@export.command()
def language(
    *,
    model: Annotated[
        Path,
        option("DIR", "A model folder, or the name of a fetched model; quantised or of floats."),
    ],
    out: Annotated[Path, option("DIR", "The folder to make.")],
    force: Annotated[
        bool, flag("Replace the language model's folder that --out names.", "--force")
    ] = False,
) -> None:
    """Export the language model as a folder for vLLM.

    The folder has the layout of Hugging Face. Quantised layers are laid out as compressed-tensors
    has them; the head becomes floats.
    """
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.checkpoint.weights import show_bytes
    from minigpt4_runtime.export.language import export_language

    try:
        num_bytes = export_language(find_model(model), out, force=force)
    except KeyboardInterrupt:
        note("Stopped. No half folder was left behind.")
        raise
    print(out, flush=True)
    note(f"The language model alone, {show_bytes(num_bytes)}.")


def _read_sizes(
    graph_format: GraphFormat,
    batch: Batch | None,
    soc_version: str | None,
    batch_sizes: str | None,
) -> tuple[int, ...] | None:
    """The batch sizes of the .om, or None if none is to be made."""
    if graph_format == "onnx":
        if soc_version or batch_sizes:
            raise ConfigError("--soc-version and --batch-sizes go with --format om.")
        return None
    if batch is not None:
        raise ConfigError("--batch goes with --format onnx; an .om takes --batch-sizes.")
    if soc_version is None:
        raise ConfigError("--format om needs --soc-version CHIP, as in Ascend910B3.")
    try:
        return tuple(sorted(int(size) for size in (batch_sizes or "1").split(",")))
    except ValueError:
        raise ConfigError(
            f"--batch-sizes is {batch_sizes!r}; it must be whole numbers, as in 1,2,4,8."
        ) from None


def _sources(paths: list[Path] | None) -> list[ImageSource]:
    if paths is not None:
        return [image(path) for path in find_images(paths, recursive=False)]
    from minigpt4_runtime.evaluation import scenes

    rng = random.Random(0)
    return [
        image(scenes.draw(scenes.random_scene(rng, held_out=True), rng)) for _ in range(_NUM_SCENES)
    ]


def _report(record: GraphRecord) -> None:
    from minigpt4_runtime.checkpoint.weights import show_bytes

    check = record.check
    note(
        f"A graph of {show_bytes(sum(record.files.values()))} in {record.dtype}. On "
        f"{check.num_pictures} pictures and {check.num_random} random ones its rows differ from "
        f"torch's by at most {check.largest_absolute:.1e}, or {check.largest_relative:.1e} of a "
        f"picture's largest value; {check.bound:g} is allowed."
    )
