"""Files of answers, read as runs that are lined up image by image.

Owns   the layouts that are read: files of `minigpt4 describe --out`, and files with several runs;
       and which images are compared.
Takes  paths; gives Runs, and a LineUp that names everything it leaves out. Opens no image.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.images import check_folder, find_image
from minigpt4_runtime.evaluation.statistics import draw_sample
from minigpt4_runtime.report.files import read_text

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Answer:
    """The answer about one image. `token_ids` are None if the file has none.

    So is `num_prompt`, the length of the prompt in tokens.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    num_prompt: int | None = None


@dataclass(frozen=True)
class Run:
    """The answers of one model in one setting, by the image's name; None where it failed."""

    name: str
    answers: Mapping[str, Answer | None]


@dataclass(frozen=True)
class Case:
    """An image, by its path within the folder of images, and each run's answer about it."""

    name: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class LineUp:
    """The images that every run has answered. `left_out` are sentences about all others."""

    runs: tuple[str, ...]
    cases: tuple[Case, ...]
    left_out: tuple[str, ...] = ()


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read files of answers, each of one or several runs, and give every run a unique name.

    Raises:
        ConfigError: a file cannot be read, has another layout, or is named twice.
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
    """Find each answer's image in a folder, and keep those that every run has answered.

    Raises:
        ConfigError: the folder or all images are missing, or two names lead to one image.
    """
    check_folder(images_dir)
    missing: dict[str, None] = {}
    found: list[Run] = []
    for run in runs:
        paths: dict[str, str] = {}
        for path in run.answers:
            name = find_image(images_dir, path)
            if name is None:
                missing[path] = None
            elif paths.setdefault(name, path) != path:
                raise ConfigError(
                    f"{run.name}: {paths[name]} and {path} both lead to {images_dir / name}. Name "
                    "the folder above, in which they are two pictures."
                )
        found.append(Run(run.name, {name: run.answers[path] for name, path in paths.items()}))
    left_out = [f"The folder {images_dir} lacks {name_some(missing)}."] if missing else []
    return _keep_common(found, left_out)


def line_up_by_name(runs: Sequence[Run]) -> LineUp:
    """Match answers by their images' names alone.

    If no name is in all runs, the folder that all names of a run share is dropped.

    Raises:
        ConfigError: even then no image has an answer from every run.
    """
    if not set.intersection(*(set(run.answers) for run in runs)):
        runs = [Run(run.name, _without_common_folder(run.answers)) for run in runs]
    return _keep_common(runs, [])


def sampled(those: LineUp, size: int, *, seed: int) -> LineUp:
    """A random sample of the images. A seed draws the same ones everywhere."""
    drawn = set(draw_sample([case.name for case in those.cases], size, seed=seed))
    return replace(those, cases=tuple(case for case in those.cases if case.name in drawn))


def name_some(names: Collection[object], noun: str = "picture") -> str:
    """A number and the first names. Example: "2 pictures (a.jpg, b.jpg)"."""
    shown = ", ".join(map(str, list(names)[:_SHOWN_NAMES]))
    shown += ", …" if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown})"


def _without_common_folder(answers: Mapping[str, Answer | None]) -> dict[str, Answer | None]:
    split = {image: re.split(r"[\\/]", image) for image in answers}
    folders = [parts[:-1] for parts in split.values()]
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    common = len(list(levels))
    return {"/".join(split[image][common:]): answer for image, answer in answers.items()}


def _keep_common(runs: Sequence[Run], left_out: list[str]) -> LineUp:
    everything = sorted({name for run in runs for name in run.answers})
    for run in runs:
        lacking = [name for name in everything if run.answers.get(name) is None]
        if lacking:
            left_out.append(f"{run.name} has no answer to {name_some(lacking)}.")
    lined_up = ((name, [run.answers.get(name) for run in runs]) for name in everything)
    cases = [Case(name, tuple(filter(None, own))) for name, own in lined_up if all(own)]
    if not cases:
        raise ConfigError(" ".join(["No picture has an answer from every run.", *left_out]))
    return LineUp(tuple(run.name for run in runs), tuple(cases), tuple(left_out))


def read_json_lines(
    path: Path, what: str, *, may_be_cut: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a file with a record a line. `what` names a record in errors.

    If it `may_be_cut`, an incomplete last line is left out.

    Raises:
        ConfigError: a line is not a record.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if may_be_cut and 1 < number == len(lines):
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
    single = [image for image, value in content.items() if not isinstance(value, dict)]
    if len(single) == len(content):
        content = {image: {path.stem: value} for image, value in content.items()}
    elif single:
        raise ConfigError(f"{path} has several runs for some pictures, and one for {single[0]}.")
    names = dict.fromkeys(name for value in content.values() for name in value) or [path.stem]
    return [Run(name, {image: _answer(path, image, value.get(name))
                       for image, value in content.items()}) for name in names]  # fmt: skip


def _read_records(path: Path) -> dict[str, Answer | None]:
    """An answer replaces a failure, and a later answer replaces an earlier one."""
    answers: dict[str, Answer | None] = {}
    for number, record in read_json_lines(path, "answer to a picture", may_be_cut=True):
        if not _is_record(record):
            raise ConfigError(
                f"Line {number} of {path} has no image and answer. Give what "
                "`minigpt4 describe --out` wrote."
            )
        image = record["image"]
        answer = _answer(path, image, record["answer"], record)
        if answer is not None or answers.get(image) is None:
            answers[image] = answer
    return answers


def _is_record(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("image"), str) and "answer" in value


def _answer(
    path: Path, image: str, text: object, record: Mapping[str, Any] = MappingProxyType({})
) -> Answer | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(
            f"{path}: the answer to {image} is {type(text).__name__}. It must be text, or null "
            "where there is none."
        )
    token_ids, num_prompt = record.get("token_ids"), record.get("prompt_tokens")
    return Answer(
        text,
        tuple(token_ids) if isinstance(token_ids, list) and token_ids else None,
        num_prompt if isinstance(num_prompt, int) else None,
    )
