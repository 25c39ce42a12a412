"""`minigpt4 quantise`: a model folder in, a smaller one out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.convert import byte_bar, hold_cache
from minigpt4_runtime.cli.options import WEIGHTS_HELP, FormatOptions, flag, option, spread_options
from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.quantise.choice import Method

if TYPE_CHECKING:
    from minigpt4_runtime.quantise.quantise import Quantised


@spread_options
def quantise(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder, or the name of a fetched one.")
    ],
    *,
    weights: Annotated[
        str,
        option(
            "FORMAT",
            WEIGHTS_HELP,
            "--format",
        ),
    ],
    out: Annotated[Path, option("DIR", "The model folder to make.")],
    options: FormatOptions,
    calibrate: Annotated[
        Path | None,
        option(
            "PATH",
            "Pictures to round the layers by: a folder, or better a .jsonl of pictures and "
            "texts, as `minigpt4 describe FOLDER --out FILE.jsonl` writes it. The first 128 count.",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="With --calibrate: gptq, which makes up for errors and is the default; awq, which "
            "scales what reads large inputs; or both.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, flag("Replace the model folder that --out names.", "--force")] = False,
) -> None:
    """Make a smaller model folder, with weights of 8 or 4 bits.

    Commands take it as they take any other. Needs as much memory as the largest weight and 1 GiB;
    what stops it half-way leaves no half model. Which format to choose: docs/quantisation.md.
    """
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.quantise.quantise import quantise as quantise_folder

    plan = options.plan(weights)
    try:
        with hold_cache(out), byte_bar() as progress:
            done = quantise_folder(
                find_model(model),
                out,
                plan,
                calibrate=calibrate,
                method=method,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        note("Stopped. No half model was left behind.")
        raise
    print(out, flush=True)
    _report(done)
    note(f"Try it: minigpt4 describe PICTURE --model {shlex.quote(str(out))}")


def _report(done: Quantised) -> None:
    from minigpt4_runtime.checkpoint.weights import show_bytes
    from minigpt4_runtime.formats.registry import show_formats

    sizes = f"{show_bytes(done.bytes_before)} became {show_bytes(done.bytes_after)}"
    note(f"{sizes}: {show_formats(done.formats)}.")
