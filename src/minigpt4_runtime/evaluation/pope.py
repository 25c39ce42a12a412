"""POPE: whether the model sees things that are not in the image.

By Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv:2305.10355.

Owns   the published layout of questions and answers, and how a model is asked.
Takes  files of questions and answers, and a model; gives PopeQuestions, and answers by their ids.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError, ImageError, RequestError
from minigpt4_runtime.evaluation.answers import name_some, read_json_lines
from minigpt4_runtime.evaluation.images import find_image
from minigpt4_runtime.messages import Message, TextDelta, image
from minigpt4_runtime.report.ledger import Ledger

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

LEDGER_KEYS = ("asked_of", "max_new_tokens", "question_id", "image", "picture", "question")
_AT_ONCE = 32

Label = Literal["yes", "no"]
Item = TypeVar("Item")
# A running answer, a known answer, or the reason why the question cannot be asked.
_Pending: TypeAlias = "Iterable[TextDelta] | str | RequestError"


@dataclass(frozen=True)
class PopeQuestion:
    """One line of a file of questions."""

    question_id: int | str
    image: str
    text: str
    label: Label


def read_questions(path: Path) -> tuple[PopeQuestion, ...]:
    """Read a file such as coco_pope_random.json.

    Raises:
        ConfigError: a line is not a question, an id occurs twice, or the file is empty.
    """
    questions: dict[int | str, PopeQuestion] = {}
    for number, record in read_json_lines(path, "POPE question"):
        try:
            question_id = _read_id(record, number, path)
            name, text, label = (record[key] for key in ("image", "text", "label"))
        except KeyError as error:
            raise ConfigError(
                f"Line {number} of {path} has no {error.args[0]!r}. A POPE question has "
                "question_id, image, text and label."
            ) from None
        if label not in ("yes", "no"):
            raise ConfigError(f"Line {number} of {path}: label is {label!r}; it must be yes or no.")
        if question_id in questions:
            raise ConfigError(f"Line {number} of {path}: question {question_id} comes twice.")
        questions[question_id] = PopeQuestion(question_id, str(name), str(text), label)
    if not questions:
        raise ConfigError(f"{path} holds no question.")
    return tuple(questions.values())


def _read_id(record: Mapping[str, Any], number: int, path: Path) -> int | str:
    question_id = record["question_id"]
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)):
        raise ConfigError(
            f"Line {number} of {path}: question_id is {question_id!r}; it must be a whole number "
            "or text."
        )
    return question_id


def read_answers(path: Path, questions: Sequence[PopeQuestion]) -> dict[int | str, str]:
    """Read answers: by question_id, or without ids in the questions' order, as POPE publishes them.

    The answer is `answer`, or `text` as LLaVA's scripts write it.

    Raises:
        ConfigError: a line is not an answer, or the answers do not belong to the questions.
    """
    lines = list(read_json_lines(path, "answer to a POPE question"))
    if all("question_id" in record for _, record in lines):
        records = [(_read_id(record, number, path), record) for number, record in lines]
    elif len(lines) == len(questions):
        records = [
            (_same_id(question, record, path), record)
            for question, (_, record) in zip(questions, lines, strict=True)
        ]
    else:
        raise ConfigError(
            f"{path} has {len(lines)} answers without question_id to {len(questions)} "
            "questions. In the questions' order there must be one for each."
        )
    answers: dict[int | str, str] = {}
    for question_id, record in records:
        answer = record.get("answer", record.get("text"))
        if not isinstance(answer, str):
            raise ConfigError(f"{path}: question {question_id} has no answer as text.")
        if question_id in answers:
            raise ConfigError(
                f"{path} answers question {question_id} twice. Give the answers of one run."
            )
        answers[question_id] = answer
    if not answers.keys() & {question.question_id for question in questions}:
        raise ConfigError(f"{path} answers none of the questions. Name the file that belongs here.")
    return answers


def _same_id(question: PopeQuestion, record: Mapping[str, Any], path: Path) -> int | str:
    """The question's id, once the record is known to repeat the question."""
    asked = str(record.get("question", question.text))
    if asked.casefold() != question.text.casefold():
        raise ConfigError(
            f"{path} answers {asked!r} where the question is {question.text!r}. The answers must "
            "stand in the questions' order."
        )
    return question.question_id


def name_strays(
    path: Path, answers: Mapping[int | str, str], questions: Sequence[PopeQuestion]
) -> tuple[str, ...]:
    """Sentences about the questions without an answer in a file, and the answers to no question."""
    asked = dict.fromkeys(question.question_id for question in questions)
    missing = [question_id for question_id in asked if question_id not in answers]
    strays = [question_id for question_id in answers if question_id not in asked]
    sentences = {
        f"{path} has no answer to {name_some(missing, 'question')}.": missing,
        f"{path} has {name_some(strays, 'answer')} to no question.": strays,
    }
    return tuple(sentence for sentence, found in sentences.items() if found)


def ask(
    model: MiniGPT4,
    questions: Sequence[PopeQuestion],
    *,
    images_dir: Path,
    prompt: str,
    sampling: SamplingParams,
    ledger: Ledger,
    asked_of: str,
    on_question: Callable[[], None] = lambda: None,
) -> tuple[dict[int | str, str], tuple[str, ...]]:
    """Ask the questions that are not in the ledger, many at once; give answers and failures.

    In `prompt`, {question} stands for the question. `asked_of` names the model in the ledger.
    """
    answers: dict[int | str, str] = {}
    faults: dict[str, None] = {}  # An image has several questions, and is named once.
    locate = functools.cache(partial(_locate, images_dir))  # Each image is read once.

    def begin(question: PopeQuestion) -> tuple[PopeQuestion, dict[str, Any], _Pending]:
        try:
            path, digest = locate(question.image)
            text = prompt.replace("{question}", question.text)
            about = {
                "asked_of": asked_of,
                "max_new_tokens": sampling.max_new_tokens,
                "question_id": question.question_id,
                "image": question.image,
                "picture": digest,
                "question": text,
            }
            if (known := ledger.find(**about)) is not None:
                return question, about, known["answer"]
            message = Message("user", (image(path), text))
            return question, about, model.submit([message], sampling)
        except RequestError as error:
            return question, {}, error

    for question, about, pending in _ahead(map(begin, questions), _AT_ONCE):
        answer = _finish(pending)
        if isinstance(answer, RequestError):
            faults[str(answer)] = None
        else:
            answers[question.question_id] = answer
            if ledger.find(**about) is None:
                ledger.add({**about, "label": question.label, "answer": answer})
        on_question()
    return answers, tuple(faults)


def _ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, taken `count` ahead, so that their answers run together."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting.popleft()
    yield from waiting


def _locate(images_dir: Path, name: str) -> tuple[Path, str]:
    """The path of a question's image, and the digest of its bytes, since names are not unique."""
    path = images_dir / (find_image(images_dir, name) or "")
    if path == images_dir:
        raise ImageError(f"The folder {images_dir} lacks {name}.")
    try:
        return path, hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}).") from None


def _finish(pending: _Pending) -> str | RequestError:
    if isinstance(pending, (str, RequestError)):
        return pending
    try:
        *_, last = pending
    except RequestError as error:
        return error
    assert last.reply is not None, "a stream ends with its reply"
    return last.reply.text
