"""`minigpt4 convert`: published files in, one model folder out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.options import (
    WEIGHTS_HELP,
    FormatOptions,
    flag,
    option,
    spread_options,
)
from minigpt4_runtime.cli.terminal import note, open_bars
from minigpt4_runtime.config import DTypeName

if TYPE_CHECKING:
    from minigpt4_runtime.convert.convert import Conversion, Progress

DType = Annotated[
    DTypeName | None,
    typer.Option(
        help="Store all weights in this dtype; without it every weight keeps the dtype it was "
        "published in."
    ),
]


Weights = Annotated[str | None, option("FORMAT", WEIGHTS_HELP, "--format")]


@spread_options
def convert(
    *,
    language: Annotated[Path, option("DIR", "The published language model's folder.")],
    vision: Annotated[Path, option("FILE", "eva_vit_g.pth")],
    projection: Annotated[
        Path,
        option(
            "FILE", "The model's own file: pretrained_minigpt4*.pth or minigptv2_checkpoint.pth."
        ),
    ],
    out: Annotated[Path, option("DIR", "The model folder to make.")],
    qformer: Annotated[
        Path | None,
        option("FILE", "blip2_pretrained_flant5xxl.pth; for the Vicuna variant only."),
    ] = None,
    bert: Annotated[
        Path | None,
        option("DIR", "A folder with bert-base-uncased's config.json; goes with --qformer."),
    ] = None,
    base: Annotated[
        Path | None,
        option(
            "DIR",
            "The LLaMA that --language is added to, where that is a delta (vicuna-7b-delta-v0).",
        ),
    ] = None,
    dtype: DType = None,
    weights: Weights = None,
    options: FormatOptions,
    image_size: Annotated[
        int | None,
        option("PIXELS", "Stretch the image tower to another picture size.", min=1),
    ] = None,
    variant: Annotated[
        str | None,
        option("NAME", "vicuna, llama2 or minigptv2, where the files do not tell."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        option("NUMBER", "LoRA's alpha, in place of the one in --projection's config, or 16."),
    ] = None,
    keep_lora: Annotated[
        bool,
        flag(
            "Keep LoRA adapters beside the weights that they change, and add them to each product.",
            "--keep-lora",
        ),
    ] = False,
    verify: Annotated[
        bool,
        flag(
            "Compare every weight with the files, and compute an image and a prompt from both.",
            "--verify",
        ),
    ] = False,
    force: Annotated[bool, flag("Replace the model folder that --out names.", "--force")] = False,
) -> None:
    """Make a model folder from the published files.

    The Vicuna variant needs --qformer and --bert, the Llama-2 variant and MiniGPT-v2 neither, whose
    LoRA adapters are merged into the language model, unless --keep-lora is given. Needs as much
    memory as the largest file and 1 GiB; what stops it half-way leaves no half model. With --format
    the weights are quantised as they are written: see `minigpt4 quantise`.
    """
    from minigpt4_runtime.convert.convert import PublishedFiles
    from minigpt4_runtime.convert.convert import convert as convert_files

    files = PublishedFiles(
        language_dir=language,
        vision=vision,
        projection=projection,
        qformer=qformer,
        bert_dir=bert,
        base_dir=base,
        variant=variant,
    )
    try:
        with hold_cache(out), byte_bar() as progress:
            conversion = convert_files(
                files,
                out,
                dtype=dtype,
                image_size=image_size,
                lora_alpha=lora_alpha,
                keep_lora=keep_lora,
                force=force,
                verify=verify,
                choose_formats=options.choice(weights),
                progress=progress,
                warn=note,
            )
    except KeyboardInterrupt:
        note("Stopped. No half model was left behind.")
        raise
    print(out, flush=True)
    _report(conversion, dtype)
    note(f"Try it: minigpt4 describe PICTURE --model {shlex.quote(str(out))}")


def hold_cache(out: Path) -> AbstractContextManager[None]:
    """Lock the cache if `out` lies in it, where fetches clear unfinished folders."""
    from minigpt4_runtime.checkpoint.shelf import is_cleared

    if not is_cleared(out):
        return nullcontext()
    from minigpt4_runtime.hub.fetch import cache_lock

    return cache_lock()


def _report(conversion: Conversion, dtype: DTypeName | None) -> None:
    from minigpt4_runtime.checkpoint.weights import show_bytes
    from minigpt4_runtime.formats.registry import show_formats

    size = show_bytes(conversion.num_bytes)
    formats = conversion.manifest.weight_format
    dtypes = " and ".join(conversion.manifest.dtypes)
    held = f"{dtypes} weights" if formats == "float" else f"weights: {show_formats(formats)}"
    note(f"The {conversion.variant} variant, {size} of {held}.")
    if conversion.doubt:
        note(conversion.doubt)
    rounded = "" if dtype is None else f" in {dtype}"
    if (found := conversion.verification) is not None:
        note(
            f"Verified: all {found.num_weights} weights are the published ones{rounded}. Computed "
            f"from both, an image's rows differ by {found.rows_difference:.1e} of the largest "
            f"value, a prompt's logits by {found.logits_difference:.1e}."
        )


@contextmanager
def byte_bar() -> Iterator[Progress]:
    """A bar on stderr that counts bytes, if stderr is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    with open_bars(
        TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, visible=False)

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(
                task, description=stage, completed=done_bytes, total=total_bytes, visible=True
            )

        yield show
