"""Visual question answering: the published files of VQAv2, OK-VQA, GQA, VizWiz, VSR and HM.

By Goyal et al., arXiv:1612.00837; Marino et al., arXiv:1906.00067; Hudson and Manning,
arXiv:1902.09506; Gurari et al., arXiv:1802.08218; Liu et al., arXiv:2205.00363 (Visual Spatial
Reasoning); Kiela et al., arXiv:2005.04790 (Hateful Memes).

Owns   their layouts.
Takes  files of questions, and of people's answers where they are apart; gives VqaQuestions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import Id, read_json
from minigpt4_runtime.evaluation.images import find_image

# What label 0 and label 1 mean.
_VSR, _HM = ("false", "true"), ("no", "yes")
_WANTED = "Give the questions of VQAv2, OK-VQA or GQA, or a list with image, question and answer."


@dataclass(frozen=True)
class VqaQuestion:
    """A question and what people answered: ten of them, or one where the answer is certain."""

    question_id: Id
    image: str
    text: str
    right: tuple[str, ...]


def read_questions(
    path: Path, annotations: Path | None, *, images_dir: Path
) -> tuple[VqaQuestion, ...]:
    """Read questions in one of these layouts.

    - VQAv2 and OK-VQA: {"questions": […]}, and {"annotations": […]} in `annotations`.
    - GQA: {id: {"imageId", "question", "answer"}}.
    - A list of records with image (or image_id), question, and answer or answers, as VizWiz has it;
      in a .jsonl a record a line.
    - A line each of VSR: image, caption, and label, of which 1 is "true" and 0 "false".
    - A line each of HM: img, text, and label, of which 1 is "yes" and 0 "no".

    An image that has only a number is looked for under COCO's names in `images_dir`.

    Raises:
        ConfigError: a file has another layout, or a question no answers.
    """
    if path.suffix.lower() == ".jsonl":
        content = [record for _, record in read_json_lines(path, "question")]
    else:
        content = read_json(path)
    records = _with_annotations(content, path, annotations)
    questions: dict[Id, VqaQuestion] = {}
    for place, question_id, record in records:
        question = _read(question_id, record, place, images_dir)
        if question_id in questions:
            raise ConfigError(f"{place}: question {question_id} comes twice.")
        questions[question_id] = question
    if not questions:
        raise ConfigError(f"{path} holds no question.")
    return tuple(questions.values())


_Record = Mapping[str, Any]


def _with_annotations(
    content: object, path: Path, annotations: Path | None
) -> Iterator[tuple[str, Id, _Record]]:
    """The place, the id and the fields of each question, with people's answers among them."""
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        if annotations is None:
            raise ConfigError(f"{path} has no answers. Give their file with --annotations.")
        yield from _joined(content, path, annotations)
    elif annotations is not None:
        raise ConfigError(f"{path} holds the answers itself: leave --annotations out.")
    elif isinstance(content, dict):
        for key, record in content.items():
            place = f"Question {key} of {path}"
            yield place, key, _checked(record, place)
    elif isinstance(content, list):
        for number, record in enumerate(content, start=1):
            place = f"Question {number} of {path}"
            given = {"question_id": number, **_as_question(_checked(record, place))}
            yield place, _id_of(given, place), given
    else:
        raise ConfigError(f"{path} is no JSON object or list. {_WANTED}")


def _joined(content: _Record, path: Path, annotations: Path) -> Iterator[tuple[str, Id, _Record]]:
    """Questions of VQAv2 or OK-VQA, each with the answers to it in the other file."""
    given = read_json(annotations)
    if not isinstance(given, dict) or not isinstance(given.get("annotations"), list):
        raise ConfigError(
            f"{annotations} has no 'annotations'. Give the answers of VQAv2 or OK-VQA."
        )
    answers: dict[Id, object] = {}
    for number, each in enumerate(given["annotations"], start=1):
        place = f"Answer {number} of {annotations}"
        record = _checked(each, place)
        answers[_id_of(record, place)] = record.get("answers")
    subset = {"data_subtype": content.get("data_subtype", "")}
    for number, each in enumerate(content["questions"], start=1):
        place = f"Question {number} of {path}"
        record = _checked(each, place)
        question_id = _id_of(record, place)
        if question_id not in answers:
            raise ConfigError(f"{annotations} has no answers to question {question_id}.")
        yield place, question_id, {**subset, **record, "answers": answers[question_id]}


def _checked(record: object, place: str) -> _Record:
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is no object. {_WANTED}")
    return record


def _as_question(record: _Record) -> _Record:
    """A statement about a picture that is right or wrong, by the names of a question."""
    for image, text, answers in (("image", "caption", _VSR), ("img", "text", _HM)):
        if record.keys() >= {image, text, "label"} and record["label"] in (0, 1):
            return {
                "image": record[image], "question": record[text],
                "answer": answers[int(record["label"])],
            }  # fmt: skip
    return record


def _id_of(record: _Record, place: str) -> Id:
    question_id = record.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)):
        raise ConfigError(f"{place}: question_id must be a whole number or text.")
    return question_id


def _read(question_id: Id, record: _Record, place: str, images_dir: Path) -> VqaQuestion:
    text = record.get("question")
    if not isinstance(text, str):
        raise ConfigError(f"{place} has no 'question' as text. {_WANTED}")
    given = record.get("answers", [record.get("answer")])
    answers = given if isinstance(given, list) else []
    said = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    right = tuple(each for each in said if isinstance(each, str))
    if not right or len(right) < len(said):
        raise ConfigError(f"{place} has no answers as text. {_WANTED}")
    names = _image_names(record)
    if not names:
        raise ConfigError(f"{place} names no image. {_WANTED}")
    there = (name for name in names if find_image(images_dir, name))
    return VqaQuestion(question_id, next(there, names[0]), text, right)


def _image_names(record: _Record) -> list[str]:
    """The file's name, or the names that COCO gives to an image of this number."""
    for key in ("image", "imageId", "image_id"):
        given = record.get(key)
        if isinstance(given, str):
            return [given if "." in given else f"{given}.jpg"]
        if isinstance(given, int):
            subset = record.get("data_subtype", "")
            names = [f"COCO_{subset}_{given:012d}.jpg"] if subset else []
            return [*names, f"{given:012d}.jpg", f"{given}.jpg"]
    return []
