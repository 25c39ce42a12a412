"""`minigpt4 quantise`: a model folder in, a smaller one out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.convert import byte_bar, hold_cache
from minigpt4_runtime.cli.options import flag, option
from minigpt4_runtime.cli.terminal import note

if TYPE_CHECKING:
    from minigpt4_runtime.quantise.quantise import Quantised


def quantise(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder, or the name of a fetched one.")
    ],
    *,
    weights: Annotated[
        str,
        option(
            "FORMAT",
            "How the language model's layers are held: w8a16, w8a8, w4a16 or w4a8. wN is the bits "
            "of a weight; a8 multiplies in 8 bits too, a16 in floats.",
            "--format",
        ),
    ],
    out: Annotated[Path, option("DIR", "The model folder to make.")],
    group_size: Annotated[
        int | None,
        option(
            "COUNT",
            "Inputs that share a scale: 32, 64 or 128. Without it, 8 bits have a scale for each "
            "row, and 4 bits for each 64 inputs, or 32 where 64 does not divide them.",
        ),
    ] = None,
    asymmetric: Annotated[
        bool, flag("Give each scale a zero point, for weights that lean to a side.", "--asymmetric")
    ] = False,
    head: Annotated[
        str | None,
        option("FORMAT", "The same for the output matrix, or keep; 8 bits without it."),
    ] = None,
    image_side: Annotated[
        str | None,
        option("FORMAT", "The same for the image side, or keep; 8 bits without it."),
    ] = None,
    force: Annotated[bool, flag("Replace the model folder that --out names.", "--force")] = False,
) -> None:
    """Make a smaller model folder, with weights of 8 or 4 bits.

    Commands take it as they take any other. Needs as much memory as the largest weight and 1 GiB;
    what stops it half-way leaves no half model. Which format to choose: docs/quantisation.md.
    """
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.quantise.choice import QuantisePlan
    from minigpt4_runtime.quantise.quantise import quantise as quantise_folder

    plan = QuantisePlan(
        weights=weights, group_size=group_size, is_symmetric=not asymmetric, head=head,
        image_side=image_side,
    )  # fmt: skip
    try:
        with hold_cache(out), byte_bar() as progress:
            done = quantise_folder(find_model(model), out, plan, force=force, progress=progress)
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
