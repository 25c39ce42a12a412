"""MME: two yes-or-no questions about each picture, in fourteen tasks.

By Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv:2306.13394.

Owns   the published layout of questions and of collected answers, and how an answer is read.
Takes  folders; gives MmeQuestions, and answers by their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.asking import Id
from minigpt4_runtime.evaluation.images import find_image
from minigpt4_runtime.report.files import read_text

# Tasks in the published order, by what their sum is called.
GROUPS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
        "artwork", "OCR",
    ),
    "cognition": (
        "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class MmeQuestion:
    """One of the two questions about a picture."""

    question_id: str
    task: str
    image: str
    text: str
    label: Literal["yes", "no"]


def read_answer(answer: str) -> Literal["yes", "no", "other"]:
    """As the published script reads it: by yes or no among the first four characters."""
    begins = answer.lower()[:4]
    return "yes" if "yes" in begins else "no" if "no" in begins else "other"


def read_questions(folder: Path, images_dir: Path) -> tuple[MmeQuestion, ...]:
    """Read a file TASK.txt for each task: picture, question and Yes or No, divided by tabs.

    A further column, such as a model's answer, is left out. Pictures are looked for in TASK/images,
    in TASK and in the folder itself.

    Raises:
        ConfigError: there is no such file, or a line or a picture's number of questions is wrong.
    """
    questions: list[MmeQuestion] = []
    for path, task in _files(folder):
        of_task: dict[str, list[MmeQuestion]] = {}
        for place, (name, text, right, *_) in _lines(path, num_columns=3):
            label = right.strip().lower()
            if label not in ("yes", "no"):
                raise ConfigError(f"{place}: the right answer is {right!r}, neither Yes nor No.")
            of_image = of_task.setdefault(name, [])
            places = (f"{task}/images/{name}", f"{task}/{name}", name)
            image = next((p for p in places if find_image(images_dir, p) == p), name)
            question_id = f"{task}/{name}#{len(of_image) + 1}"
            of_image.append(
                MmeQuestion(question_id, task, image, text, "yes" if label == "yes" else "no")
            )
        if odd := [name for name, of_image in of_task.items() if len(of_image) != 2]:
            raise ConfigError(f"{path}: {odd[0]} has {len(of_task[odd[0]])} questions, not two.")
        questions += [each for of_image in of_task.values() for each in of_image]
    return tuple(questions)


def read_answers(folder: Path, questions: Sequence[MmeQuestion]) -> dict[Id, str]:
    """Read collected answers, as the published script takes them: a fourth column in each file.

    Raises:
        ConfigError: a line has no fourth column, or answers a question that is not asked.
    """
    ids = {(each.task, Path(each.image).name, each.text): each.question_id for each in questions}
    answers: dict[Id, str] = {}
    for path, task in _files(folder):
        for place, (name, text, _, answer, *_) in _lines(path, num_columns=4):
            question_id = ids.get((task, name, text))
            if question_id is None:
                raise ConfigError(f"{place} answers {text!r} about {name}, which is not asked.")
            answers[question_id] = answer
    return answers


def _files(folder: Path) -> list[tuple[Path, str]]:
    tasks = [task for tasks in GROUPS.values() for task in tasks]
    found = [(path, task) for task in tasks if (path := folder / f"{task}.txt").is_file()]
    if not found:
        raise ConfigError(f"{folder} has no file such as existence.txt. Name MME's folder of them.")
    return found


def _lines(path: Path, *, num_columns: int) -> list[tuple[str, list[str]]]:
    lines = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        columns = line.rstrip("\r").split("\t")
        if line.strip() and len(columns) < num_columns:
            raise ConfigError(
                f"Line {number} of {path} has {len(columns)} columns; {num_columns} are wanted, "
                "divided by tabs."
            )
        if line.strip():
            lines.append((f"Line {number} of {path}", columns))
    return lines
