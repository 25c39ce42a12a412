"""`minigpt4 merge`: a model folder and an adapter in, one model folder or checkpoint out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from minigpt4_runtime.cli.convert import byte_bar, hold_cache
from minigpt4_runtime.cli.options import flag, option
from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.errors import ConfigError


def merge(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder, or the name of a fetched one.")
    ],
    *,
    adapter: Annotated[
        Path,
        option(
            "PATH",
            "What `minigpt4 tune` made of this model, a file or a folder, a LoRA folder of PEFT, "
            "or a .pth of the original's training.",
        ),
    ],
    out: Annotated[Path | None, option("DIR", "The model folder to make.")] = None,
    export_original: Annotated[
        Path | None,
        option(
            "FILE",
            "Write what was trained as the original's training saves it: a .pth for its `ckpt`.",
        ),
    ] = None,
    force: Annotated[
        bool, flag("Replace what --out and --export-original name, if it is there.", "--force")
    ] = False,
) -> None:
    """Make a model folder that has an adapter's weights as its own.

    It can be quantised, exported and served as any other, and needs no --adapter. LoRA is added
    to weights of floats in float32 and rounded once; that of weights of integers stays beside them.
    """
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.convert.fine_tune import own_adapter
    from minigpt4_runtime.export.original import check_place
    from minigpt4_runtime.export.original import export_original as write_original

    if out is None and export_original is None:
        raise ConfigError("Nothing is to be made. Give --out DIR, --export-original FILE, or both.")
    if export_original is not None:
        check_place(export_original, force=force)
    model_dir = find_model(model)
    with own_adapter(adapter, model_dir) as path:
        if out is not None:
            _merge(model_dir, path, out, made_of=None if path == adapter else adapter, force=force)
        if export_original is not None:
            for needed in write_original(path, model_dir, export_original):
                note(needed)
            print(export_original, flush=True)
    if out is not None:
        note(f"Try it: minigpt4 describe PICTURE --model {shlex.quote(str(out))}")


def _merge(model_dir: Path, adapter: Path, out: Path, *, made_of: Path | None, force: bool) -> None:
    from minigpt4_runtime.checkpoint.merge import merge as merge_folder

    with hold_cache(out), byte_bar() as progress:

        def show(done: int, total: int) -> None:
            progress("merging", done, total)

        merge_folder(model_dir, adapter, out, made_of=made_of, force=force, on_bytes=show)
    print(out, flush=True)
