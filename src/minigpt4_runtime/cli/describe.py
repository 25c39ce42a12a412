"""`minigpt4 describe`: one question about each of many pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import typer

from minigpt4_runtime.batch.finding import (
    Place,
    find_images,
    is_folder,
    is_missing,
    read_place,
    source_of,
)
from minigpt4_runtime.batch.results import Record, open_results
from minigpt4_runtime.cli.options import (
    AllowLocalUrls,
    ModelOptions,
    SamplingOptions,
    option,
    spread_options,
)
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar, report
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.messages import Described
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        help="Pictures, folders of pictures, addresses (https://…), or - for one on stdin.",
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive", "-r", help="Look into the folders' subfolders too.")
]
PromptText = Annotated[str, option("TEXT", "What to ask about each picture.")]
OutPath = Annotated[
    Path | None,
    option(
        "FILE",
        "Write the results too: FILE.json gets one object, picture to answer (null where it "
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
    allow_local_urls: AllowLocalUrls = False,
    where: ModelOptions,
    sampling: SamplingOptions,
) -> None:
    """Describe pictures, or ask one question about each.

    Many pictures are described at once, and shown in order. Answers go to stdout, all else to
    stderr. With a folder or several pictures every line of an
    answer begins with "PATH: ". A picture that cannot be read, or not in its format, is reported,
    recorded and skipped; the exit status is then 1 at the end. In a folder, files that are no
    pictures are passed over. Ctrl-C loses nothing that is done. An address must lead to a public
    machine and to a picture of up to 32 MiB, without a redirect, within 10 seconds.

    A record in a .jsonl has the keys image, answer, finish_reason, prompt_tokens,
    completion_tokens, token_ids, seconds and error; answer or error is null. An existing .jsonl
    is only continued, never replaced; a .json is replaced when all is done.
    """
    params = sampling.params()
    places = [read_place(path) for path in paths]
    pictures = find_images(places, recursive=recursive, with_unreadable=True)
    names = [str(picture) for picture in pictures]
    results = open_results(out, resume=resume, images=names, note=note)
    todo = [picture for picture in pictures if str(picture) not in results.done]
    shows_names = len(pictures) > 1 or any(
        isinstance(place, Path) and is_folder(place) for place in places
    )
    tally = Counter(done=len(pictures) - len(todo))
    try:
        with (
            results,
            progress_bar(len(todo)) as bar,
            _Screen(bar, shows_names=shows_names) as screen,
        ):
            asked = _Question(where, prompt, params, allow_local_urls)
            for index, record in _describe_all(todo, asked, bar):
                results.add(record)
                tally["failed" if record.answer is None else "described"] += 1
                screen.add(index, record)
                bar.advance()
    finally:
        if tally.total() and (len(pictures) > 1 or tally["done"]):
            _sum_up(tally)
    if tally["failed"]:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Question:
    """What is asked about each picture, and of whom."""

    where: ModelOptions
    prompt: str
    params: SamplingParams
    allows_local: bool


def _describe_all(
    pictures: list[Place], asked: _Question, bar: ProgressBar
) -> Iterator[tuple[int, Record]]:
    """Results with their places in the list. What is not there comes first: that takes no model."""
    there = []
    for index, picture in enumerate(pictures):
        if isinstance(picture, Path) and is_missing(picture):
            missing = f"{picture} does not exist."
            yield index, Record(image=str(picture), seconds=0.0, error=missing)
        else:
            there.append((index, picture, source_of(picture, allows_local=asked.allows_local)))
    if there:
        with bar.aside():
            model = asked.where.load()
        sources = [source for _, _, source in there]
        for described in model.describe_all(sources, asked.prompt, asked.params):
            index, picture, _ = there[described.index]
            yield index, _record(picture, described)


def _record(picture: Place, described: Described) -> Record:
    seconds, reply = round(described.seconds, 3), described.reply
    if reply is None:
        return Record(image=str(picture), seconds=seconds, error=str(described.error))
    return Record(
        image=str(picture),
        answer=reply.text,
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        token_ids=reply.token_ids,
        seconds=seconds,
    )


class _Screen:
    """Shows records in the order of their pictures, whatever the order in which they come."""

    def __init__(self, bar: ProgressBar, *, shows_names: bool) -> None:
        self._bar = bar
        self._shows_names = shows_names
        self._waiting: dict[int, Record] = {}
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Show what still waits for others that will not come."""
        self._show([self._waiting.pop(index) for index in sorted(self._waiting)])

    def add(self, index: int, record: Record) -> None:
        """Take one more, and show all that none is missing before."""
        self._waiting[index] = record
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._next += 1
        self._show(ready)

    def _show(self, records: list[Record]) -> None:
        if records:
            with self._bar.aside():
                for record in records:
                    _show(record, shows_names=self._shows_names)


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
