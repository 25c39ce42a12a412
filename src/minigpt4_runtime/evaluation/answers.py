"""Files of answers → runs, and runs lined up picture by picture.

Owns   the layouts that are read: what `minigpt4 describe --out` writes, and one file of several
       runs; how a name in them leads to a picture, and which pictures are compared.
Takes  paths; gives Runs and a LineUp that names whatever does not fit.
Never  opens a picture.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.statistics import draw_sample

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Answer:
    """What was said of one picture. `token_ids` are there if the file has them."""

    text: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Run:
    """The answers of one model in one setting, by the picture's name; None where it failed."""

    name: str
    answers: Mapping[str, Answer | None]


@dataclass(frozen=True)
class Case:
    """A picture, by its path within the folder of pictures, and what each run said of it."""

    name: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class LineUp:
    """The pictures that every run has answered. `left_out` says in sentences what is not here."""

    runs: tuple[str, ...]
    cases: tuple[Case, ...]
    left_out: tuple[str, ...] = ()


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read files of answers, each of one run or of several, and give every run a name of its own.

    Raises:
        ConfigError: a file cannot be read or has another layout, or is named twice.
    """
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise ConfigError(f"{path} is named twice. Compare it with another file.")
    runs = [(path, run) for path in paths for run in _read_file(path)]
    taken = Counter(run.name for _, run in runs)
    return tuple(
        run if taken[run.name] == 1 else replace(run, name=f"{run.name} ({path})")
        for path, run in runs
    )


def line_up(runs: Sequence[Run], images_dir: Path) -> LineUp:
    """Find each answer's picture in a folder, and keep those that every run has answered.

    Raises:
        ConfigError: there is no such folder or no such picture, or two names lead to one picture.
    """
    check_folder(images_dir)
    missing: dict[str, None] = {}
    found: list[Run] = []
    for run in runs:
        places = {image: find_picture(images_dir, image) for image in run.answers}
        missing.update(dict.fromkeys(image for image, name in places.items() if name is None))
        found.append(Run(run.name, _rename(run, places, images_dir)))
    left_out = [f"The folder {images_dir} lacks {name_some(missing)}."] if missing else []
    return _keep_common(found, left_out)


def line_up_by_name(runs: Sequence[Run]) -> LineUp:
    """Match answers by their pictures' names alone.

    Where no name is in all runs, what all names of a run begin with, up to a folder, is dropped.

    Raises:
        ConfigError: still no picture has an answer from every run.
    """
    if not set.intersection(*(set(run.answers) for run in runs)):
        runs = [Run(run.name, _without_common_folder(run.answers)) for run in runs]
    return _keep_common(runs, [])


def sampled(those: LineUp, size: int, *, seed: int) -> LineUp:
    """The same, with only so many pictures drawn by lot. A seed draws the same ones everywhere."""
    drawn = set(draw_sample([case.name for case in those.cases], size, seed=seed))
    return replace(those, cases=tuple(case for case in those.cases if case.name in drawn))


def check_folder(images_dir: Path) -> None:
    """Refuse what is no folder of pictures, before anything is computed.

    Raises:
        ConfigError: there is no such folder.
    """
    if not images_dir.is_dir():
        raise ConfigError(f"--images is {images_dir}, and there is no such folder.")


def find_picture(images_dir: Path, image: str) -> str | None:
    """Where a picture lies within a folder, named by its path elsewhere: by its longest tail.

    Example: /data/coco/val/7.jpg is val/7.jpg in a folder that has that, or else 7.jpg.
    """
    parts = [part for part in re.split(r"[\\/]", image) if part not in ("", ".", "..")]
    for first in range(len(parts)):
        name = "/".join(parts[first:])
        if (images_dir / name).is_file():
            return name
    return None


def name_some(names: Collection[str]) -> str:
    """Pictures in a sentence; of many, only the first are told: "2 pictures (a.jpg, b.jpg)"."""
    shown = ", ".join(list(names)[:_SHOWN_NAMES])
    shown += ", …" if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} picture{'s' if len(names) > 1 else ''} ({shown})"


def _rename(
    run: Run, places: Mapping[str, str | None], images_dir: Path
) -> dict[str, Answer | None]:
    images: dict[str, str] = {}
    for image, name in places.items():
        if name is not None and images.setdefault(name, image) != image:
            raise ConfigError(
                f"{run.name}: {images[name]} and {image} both lead to {images_dir / name}. Name "
                "the folder above, in which they are two pictures."
            )
    return {name: run.answers[image] for name, image in images.items()}


def _without_common_folder(answers: Mapping[str, Answer | None]) -> dict[str, Answer | None]:
    split = {image: re.split(r"[\\/]", image) for image in answers}
    folders = [parts[:-1] for parts in split.values()]
    common = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        common += 1
    return {"/".join(split[image][common:]): answer for image, answer in answers.items()}


def _keep_common(runs: Sequence[Run], left_out: list[str]) -> LineUp:
    everything = sorted({name for run in runs for name in run.answers})
    for run in runs:
        lacking = [name for name in everything if run.answers.get(name) is None]
        if lacking:
            left_out.append(f"{run.name} has no answer to {name_some(lacking)}.")
    cases = []
    for name in everything:
        answers = [answer for run in runs if (answer := run.answers.get(name)) is not None]
        if len(answers) == len(runs):
            cases.append(Case(name, tuple(answers)))
    if not cases:
        raise ConfigError(" ".join(["No picture has an answer from every run.", *left_out]))
    return LineUp(tuple(run.name for run in runs), tuple(cases), tuple(left_out))


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ConfigError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Check its path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}).") from None


def read_json_lines(
    path: Path, what: str, *, may_be_cut: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered records of a file with one a line; a last one cut short is left out if it may be.

    Raises:
        ConfigError: a line is something else; the message calls a right one `what`.
    """
    *lines, tail = read_text(path).split("\n")
    for number, line in enumerate([*lines, tail], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if may_be_cut and number > len(lines) > 0:
                continue
            record = None
        if not isinstance(record, dict):
            raise ConfigError(f"Line {number} of {path} is no {what}.")
        yield number, record


def _read_file(path: Path) -> list[Run]:
    try:
        content = json.loads(read_text(path))
    except ValueError:
        content = None
    if not isinstance(content, dict) or _is_record(content):
        return [Run(path.stem, _read_records(path))]
    several = [value for value in content.values() if isinstance(value, dict)]
    if not several:
        return [Run(path.stem, {image: _answer(path, image, value)
                                for image, value in content.items()})]  # fmt: skip
    if len(several) < len(content):
        odd = next(image for image, value in content.items() if not isinstance(value, dict))
        raise ConfigError(f"{path} has several runs for some pictures, and one for {odd}.")
    names = dict.fromkeys(name for value in several for name in value)
    return [Run(name, {image: _answer(path, image, value.get(name))
                       for image, value in content.items()}) for name in names]  # fmt: skip


def _read_records(path: Path) -> dict[str, Answer | None]:
    """An answer counts more than a failure, and a later one more than an earlier one."""
    answers: dict[str, Answer | None] = {}
    for number, record in read_json_lines(path, "answer to a picture", may_be_cut=True):
        if not _is_record(record):
            raise ConfigError(
                f"Line {number} of {path} has no image and answer. Give what "
                "`minigpt4 describe --out` wrote."
            )
        image = record["image"]
        answer = _answer(path, image, record["answer"], record.get("token_ids"))
        if answer is not None or answers.get(image) is None:
            answers[image] = answer
    return answers


def _is_record(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("image"), str) and "answer" in value


def _answer(path: Path, image: str, text: object, token_ids: Any = None) -> Answer | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(
            f"{path}: the answer to {image} is {type(text).__name__}. It must be text, or null "
            "where there is none."
        )
    return Answer(text, tuple(token_ids) if isinstance(token_ids, list) and token_ids else None)
