"""`minigpt4 describe`: one question about each of many pictures."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from minigpt4_runtime.batch.asking import ask_about
from minigpt4_runtime.batch.drawings import Drawings
from minigpt4_runtime.batch.finding import (
    Place,
    find_images,
    hint_of_r,
    is_folder,
    is_missing,
    read_place,
    source_of,
)
from minigpt4_runtime.batch.results import Record, is_coco, open_results
from minigpt4_runtime.cli.describe_on_ray import Question, RayOptions, describe_on_ray, note_ends
from minigpt4_runtime.cli.options import (
    AllowLocalUrls,
    CacheWindow,
    ModelOptions,
    SamplingOptions,
    Task,
    flag,
    option,
    spread_options,
)
from minigpt4_runtime.cli.recipes import RecipeName, take
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar, report
from minigpt4_runtime.cluster.stores import is_in_store
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.messages import Described, ImageSource
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.evaluation.recipe import Run


@spread_options
def describe(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Pictures, folders of pictures, addresses (https://…), or - for one on stdin.",
        ),
    ],
    *,
    recursive: Annotated[
        bool, flag("Look into the folders' subfolders too.", "--recursive", "-r")
    ] = False,
    prompt: Annotated[str, option("TEXT", "What to ask about each picture.")] = DESCRIBE_PROMPT,
    task: Task = None,
    recipe: RecipeName = None,
    out: Annotated[
        str | None,
        option(
            "FILE",
            "Write the results too: FILE.json gets one object, picture to answer (null where it "
            "failed), when all is done; FILE.coco.json gets the boxes as COCO writes them; "
            "FILE.jsonl gets one record a line, as it comes. With --ray it is a folder, also "
            "s3://….",
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        option(
            "DIR",
            "Write each picture that gets boxes here as a PNG with them. With --resume, those "
            "that were done before are not drawn.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        flag(
            "Continue an existing .jsonl, or the folder of --ray: skip the pictures that have an "
            "answer in it, and try those again that failed. Keep the prompt and the model: a "
            "record names neither, and only --ray compares them.",
            "--resume",
        ),
    ] = False,
    allow_local_urls: AllowLocalUrls = False,
    cache_window: CacheWindow = None,
    where: ModelOptions,
    sampling: SamplingOptions,
    cluster: RayOptions,
) -> None:
    """Describe pictures, or ask one question about each.

    Many pictures are described at once, and shown in order. Answers go to stdout, all else to
    stderr. With a folder or several pictures every line of an
    answer begins with "PATH: ". A picture that cannot be read, or not in its format, is reported,
    recorded and skipped; the exit status is then 1 at the end. In a folder, files that are no
    pictures are passed over. Ctrl-C loses nothing that is done. An address must lead to a public
    machine and to a picture of up to 32 MiB, without a redirect, within 10 seconds.

    A record in a .jsonl has the keys image, answer, finish_reason, prompt_tokens,
    completion_tokens, evicted_tokens, token_ids, boxes, picture_size, seconds and error; answer
    or error is null. An existing .jsonl is only continued, never replaced; a .json is replaced
    when all is done.

    With --ray the records of the same form are in part-00000000.jsonl and so on in the folder of
    --out, in the order of the pictures, and no answer goes to stdout. docs/scaling.md has more.

    Boxes are there for models that write them: each has a label or null, box (left, top, right,
    bottom in pixels of the upright picture), and start and stop, its place in the answer.
    """
    others = {"--task": task, "--ray": cluster.ray}
    run = _run(recipe, prompt, sampling.params(), others)
    if cluster.ray is not None:
        question = Question(
            prompt=prompt, task=task, params=run.sampling, cache_window=cache_window,
            allow_local_urls=allow_local_urls, recursive=recursive, resume=resume, draw=draw,
        )  # fmt: skip
        describe_on_ray(paths, out, question, where, cluster)
        return
    cluster.check_absent()
    file = _file(out)
    images, shows_names = _find(paths, run, recursive=recursive)
    results = open_results(file, resume=resume, images=list(map(str, images)), note=note)
    drawings = Drawings.open(draw, list(map(str, images)))
    remaining = [image for image in images if str(image) not in results.done]
    boxes_for = f"--draw {draw}" if draw else f"--out {out}" if is_coco(file) else None
    tally = Counter(done=len(images) - len(remaining))
    try:
        with (
            results,
            progress_bar(len(remaining)) as bar,
            _Screen(bar, shows_names=shows_names) as screen,
        ):

            def ask(sources: list[ImageSource]) -> Iterator[Described]:
                with bar.aside():
                    model = _load(where, cache_window, boxes_for)
                # What is typed is text; only a recipe can say where the picture stands.
                told: dict[str, Any] = {"is_raw": True} if recipe and run.is_raw else {"task": task}
                return model.describe_all(sources, run.prompt, run.sampling, **told)

            sources = [_source(each, allow_local_urls, draw is not None) for each in remaining]
            for index, record in _trimmed(run, ask_about(list(map(str, remaining)), sources, ask)):
                if drawings and record.boxes and (source := sources[index]):
                    tally["undrawn"] += not _draw(drawings, record, source)
                results.add(record)
                _count(tally, record)
                screen.add(index, record)
                bar.advance()
    finally:
        _sum_up(tally, len(images))
    if tally["failed"] or tally["undrawn"]:
        raise typer.Exit(1)


def _find(paths: list[str], run: Run, *, recursive: bool) -> tuple[list[Place], bool]:
    """The pictures that the recipe takes of these, and whether their names stand before answers."""
    places = [read_place(path) for path in paths]
    hint = hint_of_r(recursive)
    images = find_images(places, recursive=recursive, with_unreadable=True, hint=hint)
    if run.pictures:
        images = run.pictures.choose(sorted(images, key=str))
    has_folder = any(isinstance(place, Path) and is_folder(place) for place in places)
    return images, len(images) > 1 or has_folder


def _load(where: ModelOptions, cache_window: int | None, boxes_for: str | None) -> MiniGPT4:
    """The model, which writes boxes if an option is given that is for them."""
    model = where.load(engine=EngineConfig(cache_window=cache_window))
    if boxes_for and not model.has_boxes:
        raise ConfigError(f"This model writes no boxes: leave {boxes_for} out.")
    return model


def _count(tally: Counter[str], record: Record) -> None:
    tally["failed" if record.answer is None else "described"] += 1
    tally["outgrown"] += bool(record.evicted_tokens)
    tally["cut off"] += record.finish_reason == "length"


def _sum_up(tally: Counter[str], num_images: int) -> None:
    note_ends(outgrown=tally["outgrown"], cut_off=tally["cut off"])
    if tally.total() and (num_images > 1 or tally["done"]):
        before = f", {tally['done']} done before" if tally["done"] else ""
        note(f"{tally['described']} described, {tally['failed']} failed{before}")


def _file(out: str | None) -> Path | None:
    """The path of --out.

    Raises:
        ConfigError: it is in an object store.
    """
    if out is not None and is_in_store(out):
        raise ConfigError(f"--out is {out}, and only --ray writes into a store. Name a file.")
    return None if out is None else Path(out)


def _run(
    recipe: str | None, prompt: str, params: SamplingParams, others: Mapping[str, object]
) -> Run:
    """How to ask: as the recipe does it, but for what is typed.

    Raises:
        ConfigError: one of the `others` is given, which do not go with a recipe.
    """
    from minigpt4_runtime.evaluation.recipe import Recipe, Run

    for name, value in others.items():
        if recipe and value is not None:
            raise ConfigError(f"--recipe says how to ask, and {name} too. Leave one of them out.")

    typed = Run(prompt=prompt, sampling=params)
    usual = Run(prompt=DESCRIBE_PROMPT, sampling=SamplingParams())
    choice = Recipe.read(recipe).run("captions").pictures if recipe else None
    more = (
        ("pictures are drawn from sorted names, not in the order of COCO's file of captions, as "
         "`evaluate chair` does",)
        if choice is not None and choice.order == "annotations"
        else ()
    )  # fmt: skip
    return take(recipe, "captions", typed=typed, usual=usual, more=more)


def _trimmed(run: Run, records: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """The records with their answers as the recipe cuts them; a cut answer keeps no boxes."""
    for index, record in records:
        answer = record.answer and run.trim(record.answer)
        if answer == record.answer:
            yield index, record
        else:
            yield index, replace(record, answer=answer, boxes=record.boxes and ())


def _source(image: Place, allows_local: bool, is_drawn: bool) -> ImageSource | None:
    """The image, or None where a file is missing. What is fetched to be drawn on is kept."""
    if isinstance(image, Path) and is_missing(image):
        return None
    source = source_of(image, allows_local=allows_local)
    if is_drawn and callable(source.value):
        return replace(source, value=functools.cache(source.value))
    return source


def _draw(drawings: Drawings, record: Record, source: ImageSource) -> bool:
    try:
        drawings.add(record, source)
    except ImageError as error:  # It was there when it was described.
        report(error, about=record.image)
        return False
    return True


class _Screen:
    """Shows records in the order of their images, not of their arrival."""

    def __init__(self, bar: ProgressBar, *, shows_names: bool) -> None:
        self._bar = bar
        self._shows_names = shows_names
        self._waiting: dict[int, Record] = {}
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Show the records that wait for earlier ones, which will not arrive any more."""
        self._show([self._waiting.pop(index) for index in sorted(self._waiting)])

    def add(self, index: int, record: Record) -> None:
        """Take one record, and show all records up to the first missing one."""
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
        # As in grep, every line begins with its file.
        for line in record.answer.splitlines() or [""]:
            print(f"{record.image}: {line}".rstrip(), flush=True)
    else:
        print(record.answer, flush=True)
