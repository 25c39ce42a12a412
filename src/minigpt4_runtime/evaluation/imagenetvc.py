"""ImageNetVC: what the things of ImageNet's classes usually are like, asked beside their pictures.

By Xia et al., "ImageNetVC: Zero- and Few-Shot Visual Commonsense Evaluation on 1000 ImageNet
Categories", arXiv:2305.15028. Its layout, the draw of pictures and the candidates are those of
https://github.com/hemingkx/ImageNetVC at fec7408.

Owns   the published layout, which answers are given, and which pictures of a class are shown.
Takes  its files of questions and a folder of pictures; gives ChoiceQuestions, one a picture.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping
from pathlib import Path

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.choice import ChoiceQuestion
from minigpt4_runtime.images.formats import IMAGE_SUFFIXES
from minigpt4_runtime.report.files import read_text

COLUMNS = ("category", "question", "answer")
_NUM_PICTURES, _SEED = 10, 2022


def is_layout(path: Path) -> bool:
    """Whether it may be ImageNetVC's: a .csv, or a folder of them."""
    return path.suffix == ".csv" or path.is_dir()


def read_questions(
    path: Path, images_dir: Path, classes: Path | None = None
) -> tuple[ChoiceQuestion, ...]:
    """Read color.csv, shape.csv and so on, or a folder of them: category, question and answer.

    A question's candidates are the different answers of its file, and where yes and no, numbers and
    other words are mixed, of its kind: of the whole published files those are the published lists.
    Pictures of a category are in the folder that `classes` (ImageNet_mapping.txt, a line
    "n01443537 goldfish, Carassius auratus") has for it, or in one of its name. Ten of more are
    drawn by the published seed, from sorted names.

    Raises:
        ConfigError: there is no file, it has other columns or no row, or a category is no class.
    """
    paths = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"{path} holds no .csv. Give ImageNetVC's datasets/, or one file of it.")
    folders = _read_classes(classes) if classes else {}
    shown: dict[str, list[str]] = {}
    questions: list[ChoiceQuestion] = []
    for each in paths:
        rows = _read_rows(each)
        groups: dict[str, dict[str, None]] = {}
        for _, _, answer in rows:
            groups.setdefault(_kind(answer), {})[answer] = None
        for number, (category, text, answer) in enumerate(rows, start=1):
            if classes and category not in folders:
                raise ConfigError(f"{each}: {classes} has no class whose first name is {category}.")
            folder = folders.get(category, category)
            if folder not in shown:
                shown[folder] = _draw(images_dir, folder)
            choices = tuple(groups[_kind(answer)])
            whole = f"{each.stem}/{number}"
            right = choices.index(answer)
            questions += [
                ChoiceQuestion(f"{whole}#{count}", image, text, choices, right, each.stem, whole)
                for count, image in enumerate(shown[folder], start=1)
            ]
    return tuple(questions)


def _read_rows(path: Path) -> list[tuple[str, str, str]]:
    # Else a quote that never ends would take all that follows for one field.
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    rows = []
    try:
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise ConfigError(
                f"{path} needs the columns {', '.join(COLUMNS)}, as ImageNetVC has them."
            )
        for row in reader:
            category, text, answer = (row[name] for name in COLUMNS)
            if not (category and text and answer):
                raise ConfigError(
                    f"{path}, line {reader.line_num}: a category, question or answer is missing."
                )
            rows.append((category, text, answer.lower()))
    except csv.Error as error:
        raise ConfigError(
            f"{path} is no CSV ({error}, in question {len(rows) + 1}). Is a quote never closed?"
        ) from None
    if not rows:
        raise ConfigError(f"{path} holds no question, only the names of its columns.")
    return rows


def _kind(answer: str) -> str:
    """The published script has lists of their own for yes and no, numbers, and all else."""
    return "yes or no" if answer in ("yes", "no") else "number" if answer.isdigit() else "word"


def _read_classes(path: Path) -> Mapping[str, str]:
    """The first name of each class → its folder."""
    pairs = (line.partition(" ") for line in read_text(path).splitlines() if line.strip())
    return {names.partition(",")[0].strip(): folder for folder, _, names in pairs}


def _draw(images_dir: Path, folder: str) -> list[str]:
    """The names of a category's pictures; of a missing folder its own, to be named as missing."""
    there = images_dir / folder
    names = sorted(
        each.name
        for each in (there.iterdir() if there.is_dir() else ())
        if each.suffix.lower() in IMAGE_SUFFIXES and not each.name.startswith(".")
    )
    if len(names) > _NUM_PICTURES:
        names = random.Random(_SEED).sample(names, _NUM_PICTURES)
    return [f"{folder}/{name}" for name in names] or [folder]
