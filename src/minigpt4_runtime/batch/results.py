"""Answers → a file of results: one JSON object, COCO's JSON, or one record a line.

Owns   the form of these files, and the rule that no result is lost.
Takes  a Record for each image; an existing .jsonl is only continued, a .json only replaced whole.
Never  describes anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import Box, Described
from minigpt4_runtime.report.files import append_record, write_whole


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result for one image: `answer` or `error` is None.

    `boxes` is None if the model writes none; they are parts of a picture of this `picture_size`.
    """

    image: str
    answer: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    evicted_tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    picture_size: tuple[int, int] | None = None
    seconds: float
    error: str | None = None

    @classmethod
    def of(cls, image: str, described: Described) -> Self:
        """The record of what a model made of an image; `seconds` are rounded to milliseconds."""
        seconds, reply = round(described.seconds, 3), described.reply
        if reply is None:
            return cls(image=image, seconds=seconds, error=str(described.error))
        return cls(
            image=image,
            answer=reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            evicted_tokens=reply.usage.evicted_tokens,
            token_ids=reply.token_ids,
            boxes=reply.boxes if reply.picture_size else None,
            picture_size=reply.picture_size,
            seconds=seconds,
        )


class Results:
    """No file at all; the classes below write one. `done` are the images not to do again."""

    def __init__(self) -> None:
        self.done: frozenset[str] = frozenset()

    def add(self, record: Record) -> None:
        """Keep one more record."""

    def finish(self, *, is_whole: bool) -> None:
        """Write the rest of the results; `is_whole` is False if the work was broken off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(is_whole=kind is None)


def open_results(
    path: Path | None,
    *,
    resume: bool,
    images: Sequence[str],
    note: Callable[[str], object] = lambda _: None,
) -> Results:
    """Check the file for results before anything is computed. `images` are all images of the run.

    If the run is broken off, `note` is told where its results are.

    Raises:
        ConfigError: nothing can be written there, or something would be lost.
    """
    if path is None:
        if resume:
            raise ConfigError("--resume continues a file: name it with --out results.jsonl.")
        return Results()
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ConfigError(f"--out is {path}; its name must end with .json or .jsonl.")
    if not path.parent.is_dir():
        raise ConfigError(f"--out is {path}, but there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise ConfigError(f"--out is {path}, which is a folder. Name a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--out is {path}, which may not be written. Check its permissions.")
    if path.suffix.lower() == ".jsonl":
        return JsonLines(path, resume=resume, images=images, note=note)
    if resume:
        raise ConfigError(f"--resume continues a .jsonl file, and --out is {path}.")
    kind = CocoObject if is_coco(path) else JsonObject
    return kind(path, images, note)


def is_coco(path: Path | None) -> bool:
    """Whether results at this path are boxes in COCO's form."""
    return path is not None and path.name.lower().endswith(".coco.json")


class JsonObject(Results):
    """One object, image → answer, or null where it failed, in the order of the images.

    Appears whole or not at all.
    """

    _suffix = ".json"

    def __init__(self, path: Path, images: Sequence[str], note: Callable[[str], object]) -> None:
        super().__init__()
        self._path = path
        self._images = images
        self._note = note
        self._records: dict[str, Record] = {}

    def add(self, record: Record) -> None:
        """Keep one more answer, in memory."""
        self._records[record.image] = record

    def finish(self, *, is_whole: bool) -> None:
        """Write the object; half a result goes beside an older file and does not replace it."""
        path = self._path
        if not is_whole:
            if not any(record.answer is not None for record in self._records.values()):
                return
            if path.exists():
                path = path.with_name(path.name[: -len(self._suffix)] + f".partial{self._suffix}")
            self._note(f"What was done is in {path}.")
        records = [self._records[i] for i in dict.fromkeys(self._images) if i in self._records]
        write_whole(path, json.dumps(self._content(records), ensure_ascii=False, indent=2) + "\n")

    def _content(self, records: Sequence[Record]) -> dict[str, Any]:
        return {record.image: record.answer for record in records}


class CocoObject(JsonObject):
    """The boxes in the form of COCO's annotations. Pictures without an answer are left out."""

    _suffix = ".coco.json"

    def _content(self, records: Sequence[Record]) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        found = [box for record in records for box in record.boxes or ()]
        names = sorted({_category(box) for box in found})
        for record in records:
            if record.picture_size is None:
                continue
            width, height = record.picture_size
            images.append(
                {"id": len(images) + 1, "file_name": record.image, "width": width,
                 "height": height}
            )  # fmt: skip
            for box in record.boxes or ():
                left, top, right, bottom = box.box
                width, height = right - left, bottom - top
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": len(images),
                     "category_id": names.index(_category(box)) + 1,
                     "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                )  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}


def _category(box: Box) -> str:
    """COCO has no annotation without a category."""
    return box.label or "object"


class JsonLines(Results):
    """One record a line, written as it comes."""

    def __init__(
        self,
        path: Path,
        *,
        resume: bool,
        images: Collection[str],
        note: Callable[[str], object],
    ) -> None:
        super().__init__()
        self._path = path
        self._note = note
        self._has_grown = False
        content = _read(path)
        if content and not resume:
            raise ConfigError(f"{path} exists. Continue it with --resume, or give another name.")
        if content:
            self._take_up(content, images)

    def _take_up(self, content: bytes, images: Collection[str]) -> None:
        """Note what is done; drop the failures that are tried again and a line cut short."""
        lines = {}
        for record, line in _read_lines(content, self._path):
            image = record["image"]
            if record["answer"] is not None:
                lines[image] = line
                self.done |= {image}
            elif image not in images and image not in self.done:
                lines[image] = line
        kept = b"".join(line + b"\n" for line in lines.values())
        if kept != content:
            write_whole(self._path, kept)

    def add(self, record: Record) -> None:
        """Append one line, at once."""
        append_record(self._path, asdict(record))
        self._has_grown = True

    def finish(self, *, is_whole: bool) -> None:
        """Say how to go on if the run is broken off; all is written by then."""
        if self._has_grown and not is_whole:
            self._note(f"What was done is in {self._path}: go on with --resume.")


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"--out is {path}, which is not a regular file. Give another name.")
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Give another name.") from None


def _read_lines(content: bytes, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    *lines, tail = content.split(b"\n")
    for number, line in enumerate([*lines, tail], start=1):
        is_cut_short = number > len(lines) and line.startswith(b"{")
        try:
            record = json.loads(line)
        except ValueError:
            if not line.strip() or is_cut_short:
                continue
            record = None
        if not _is_record(record):
            raise ConfigError(
                f"Line {number} of {path} is no result of `minigpt4 describe`. Give another name."
            )
        yield record, line


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("image"), str) and "answer" in value
