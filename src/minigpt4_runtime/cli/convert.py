"""`minigpt4 convert`: published files in, one model folder out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.terminal import note

if TYPE_CHECKING:
    from minigpt4_runtime.checkpoint.convert import Conversion, Progress


class DTypeChoice(StrEnum):
    """What --dtype may be: config.DTypeName, as Typer reads it."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


LanguageDir = Annotated[
    Path, typer.Option(metavar="DIR", help="The published language model's folder.")
]
VisionFile = Annotated[Path, typer.Option(metavar="FILE", help="eva_vit_g.pth")]
ProjectionFile = Annotated[
    Path,
    typer.Option(metavar="FILE", help="MiniGPT-4's own file: pretrained_minigpt4*.pth"),
]
OutDir = Annotated[Path, typer.Option(metavar="DIR", help="The model folder to make.")]
QFormerFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="blip2_pretrained_flant5xxl.pth; for the Vicuna variant only."
    ),
]
BertDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="A folder with bert-base-uncased's config.json; goes with --qformer."
    ),
]
DType = Annotated[DTypeChoice, typer.Option(help="How the weights are stored.")]
ImageSize = Annotated[
    int | None,
    typer.Option(metavar="PIXELS", help="Stretch the image tower to another picture size.", min=1),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Compute an image and a prompt from the files and from the result."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the model folder that --out names.")]


def convert(
    *,
    language: LanguageDir,
    vision: VisionFile,
    projection: ProjectionFile,
    out: OutDir,
    qformer: QFormerFile = None,
    bert: BertDir = None,
    dtype: DType = DTypeChoice.FLOAT16,
    image_size: ImageSize = None,
    verify: Verify = False,
    force: Force = False,
) -> None:
    """Make a model folder from the published files.

    The Vicuna variant needs --qformer and --bert, the Llama-2 variant neither. Needs as much
    memory as the largest file and 1 GiB; what stops it half-way leaves nothing behind.
    """
    from minigpt4_runtime.checkpoint.convert import PublishedFiles
    from minigpt4_runtime.checkpoint.convert import convert as convert_files

    files = PublishedFiles(
        language_dir=language,
        vision=vision,
        projection=projection,
        qformer=qformer,
        bert_dir=bert,
    )
    with _byte_bar() as progress:
        conversion = convert_files(
            files,
            out,
            dtype=dtype.value,
            image_size=image_size,
            force=force,
            verify=verify,
            progress=progress,
        )
    _report(conversion)
    print(out)


def _report(conversion: Conversion) -> None:
    from minigpt4_runtime.checkpoint.weights import show_bytes

    variant = "Llama-2" if conversion.config.qformer is None else "Vicuna"
    size = show_bytes(conversion.num_bytes)
    note(f"The {variant} variant, {size} of {conversion.manifest.dtype} weights.")
    if (found := conversion.verification) is not None:
        note(
            f"Verified: {found.num_weights} weights are those of the published files. One image's "
            f"rows differ from the original's by at most {found.rows_difference:.1e} of the "
            f"largest, one prompt's logits by {found.logits_difference:.1e}."
        )


@contextmanager
def _byte_bar() -> Iterator[Progress | None]:
    """A bar on stderr that counts bytes, if there is someone to see it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield show
