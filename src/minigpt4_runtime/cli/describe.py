"""`minigpt4 describe`: one question about each of many pictures."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.options import ModelOptions, SamplingOptions, spread_options
from minigpt4_runtime.cli.pictures import find_pictures, is_folder, is_missing
from minigpt4_runtime.cli.results import Record, open_results
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar, report
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

Paths = Annotated[
    list[Path], typer.Argument(metavar="PATH", help="Pictures, and folders of pictures.")
]
Recursive = Annotated[
    bool, typer.Option("--recursive", "-r", help="Look into the folders' subfolders too.")
]
PromptText = Annotated[
    str, typer.Option("--prompt", metavar="TEXT", help="What to ask about each picture.")
]
OutPath = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the results too: FILE.json gets one object, picture to answer (null where it "
        "failed), when all is done; FILE.jsonl gets one record a line, as it comes.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an existing .jsonl: skip the pictures that have an answer in it, "
        "and try those again that failed. Keep the prompt and the model: a record names neither.",
    ),
]


@spread_options
def describe(
    paths: Paths,
    *,
    recursive: Recursive = False,
    prompt: PromptText = DESCRIBE_PROMPT,
    out: OutPath = None,
    resume: Resume = False,
    where: ModelOptions,
    sampling: SamplingOptions,
) -> None:
    """Describe pictures, or ask one question about each.

    Answers go to stdout, all else to stderr. With a folder or several pictures every line of an
    answer begins with "PATH: ". A picture that cannot be read is reported and skipped; the exit
    status is then 1 at the end. Ctrl-C loses nothing that is done.

    A record in a .jsonl has the keys image, answer, finish_reason, prompt_tokens,
    completion_tokens, seconds and error; answer or error is null. An existing .jsonl is only
    continued, never replaced; a .json is replaced when all is done.
    """
    params = sampling.params()
    pictures = find_pictures(paths, recursive=recursive)
    results = open_results(out, resume=resume, images={str(picture) for picture in pictures})
    todo = [picture for picture in pictures if str(picture) not in results.done]
    shows_names = len(pictures) > 1 or any(is_folder(path) for path in paths)
    tally = Counter(done=len(pictures) - len(todo))
    try:
        with results, progress_bar(len(todo)) as bar:
            for record in _describe_all(todo, where, prompt, params, bar):
                results.add(record)
                tally["failed" if record.answer is None else "described"] += 1
                with bar.aside():
                    _show(record, shows_names=shows_names)
                bar.advance()
    finally:
        if tally.total() and (len(pictures) > 1 or tally["done"]):
            _sum_up(tally)
    if tally["failed"]:
        raise typer.Exit(1)


def _describe_all(
    pictures: list[Path],
    where: ModelOptions,
    prompt: str,
    params: SamplingParams,
    bar: ProgressBar,
) -> Iterator[Record]:
    """Those that are not there come first: to know that takes no model."""
    there = []
    for picture in pictures:
        if is_missing(picture):
            yield Record(image=str(picture), seconds=0.0, error=_why_missing(picture))
        else:
            there.append(picture)
    if there:
        with bar.aside():
            model = where.load()
        for picture in there:
            yield _describe_one(model, picture, prompt, params)


def _why_missing(picture: Path) -> str:
    if re.match(r"https?:", str(picture)):
        return f"{picture} is not fetched from the network. Download it and name the file."
    return f"{picture} does not exist."


def _describe_one(model: MiniGPT4, picture: Path, prompt: str, params: SamplingParams) -> Record:
    start = time.perf_counter()
    try:
        reply = model.describe(picture, prompt, params)
    except RequestError as error:
        return Record(image=str(picture), seconds=_seconds_since(start), error=str(error))
    return Record(
        image=str(picture),
        answer=reply.text,
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        seconds=_seconds_since(start),
    )


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _show(record: Record, *, shows_names: bool) -> None:
    if record.answer is None:
        report(record.error, about=record.image)
    elif shows_names:
        # As grep does it: every line says where it is from.
        for line in record.answer.splitlines() or [""]:
            print(f"{record.image}: {line}".rstrip(), flush=True)
    else:
        print(record.answer, flush=True)


def _sum_up(tally: Counter[str]) -> None:
    before = f", {tally['done']} done before" if tally["done"] else ""
    note(f"{tally['described']} described, {tally['failed']} failed{before}")
