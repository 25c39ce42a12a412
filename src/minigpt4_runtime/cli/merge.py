"""`minigpt4 merge`: a model folder and an adapter in, one model folder out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from minigpt4_runtime.cli.convert import byte_bar, hold_cache
from minigpt4_runtime.cli.options import flag, option
from minigpt4_runtime.cli.terminal import note


def merge(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder, or the name of a fetched one.")
    ],
    *,
    adapter: Annotated[
        Path,
        option(
            "PATH",
            "What `minigpt4 tune` made of this model, a file or a folder, or a LoRA folder of "
            "PEFT.",
        ),
    ],
    out: Annotated[Path, option("DIR", "The model folder to make.")],
    force: Annotated[bool, flag("Replace the model folder that --out names.", "--force")] = False,
) -> None:
    """Make a model folder that has an adapter's weights as its own.

    It can be quantised, exported and served as any other, and needs no --adapter. LoRA is added
    to weights of floats in float32 and rounded once; that of weights of integers stays beside them.
    """
    from minigpt4_runtime.checkpoint.merge import merge as merge_folder
    from minigpt4_runtime.checkpoint.shelf import find_model

    with hold_cache(out), byte_bar() as progress:

        def show(done: int, total: int) -> None:
            progress("merging", done, total)

        merge_folder(find_model(model), adapter, out, force=force, on_bytes=show)
    print(out, flush=True)
    note(f"Try it: minigpt4 describe PICTURE --model {shlex.quote(str(out))}")
