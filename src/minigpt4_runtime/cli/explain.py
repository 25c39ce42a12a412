"""`minigpt4 explain`: how an answer about a picture came about, as a page."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.batch.finding import is_folder, read_place, source_of
from minigpt4_runtime.cli.options import (
    AllowLocalUrls,
    ModelOptions,
    SamplingOptions,
    Task,
    option,
    spread_options,
)
from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import ImageSource, Message
from minigpt4_runtime.report.files import ReportFolder
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image


@spread_options
def explain(
    picture: Annotated[
        str,
        typer.Argument(
            metavar="PICTURE", help="A picture, an address (https://…), or - for stdin."
        ),
    ],
    *,
    prompt: Annotated[str, option("TEXT", "What to ask about it.")] = DESCRIBE_PROMPT,
    task: Task = None,
    answer: Annotated[
        str | None,
        option("TEXT", "Explain this answer, right or wrong, in the place of the model's own."),
    ] = None,
    out: Annotated[
        Path,
        option(
            "DIR",
            "The folder for explain.html, the page; explain.json, all numbers; and explain.csv, a "
            "row for each token.",
        ),
    ],
    allow_local_urls: AllowLocalUrls = False,
    where: ModelOptions,
    sampling: SamplingOptions,
) -> None:
    """Show how an answer came about: where each word looked, and more.

    The answer goes to stdout. It is computed as `describe` does it, and then once more with its
    attention in view. That says where the model has read, not why it has said something.
    """
    params = sampling.params()
    if answer is not None and not answer.strip():
        raise ConfigError("--answer is empty: there is no word to explain.")
    source = _open(picture, allows_local=allow_local_urls)
    folder = ReportFolder(out, "explain")
    model = where.load()
    asked = [Message("user", (source, prompt), task=task)]
    lab = model.lab()
    studied = lab.prompt(asked)
    if answer is None:
        reply = model.chat(asked, params)
        answer, token_ids = reply.text, reply.token_ids
    else:
        token_ids = lab.ids_of(answer)
    print(answer, flush=True)
    explanation = lab.explain(studied, token_ids).showing([_upright(source)])
    note(f"The page is {folder.write(explanation)}.")


def _open(picture: str, *, allows_local: bool) -> ImageSource:
    place = read_place(picture)
    if isinstance(place, Path) and is_folder(place):
        raise ConfigError(f"{place} is a folder. Name one picture.")
    source = source_of(place, allows_local=allows_local)
    # What is fetched is looked at twice, by the model and on the page.
    if callable(source.value):
        return replace(source, value=functools.cache(source.value))
    return source


def _upright(source: ImageSource) -> Image:
    from minigpt4_runtime.images.pixels import open_rgb

    return open_rgb(source)
