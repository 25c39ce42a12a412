"""POPE: does the model see things that are not there?

By Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv:2305.10355.

Owns   the published layout of questions and answers, and how a model is asked.
Takes  files of questions and answers, and a model; gives Questions, and answers by their ids.
Never  chooses the questions, and never counts.
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

from minigpt4_runtime.errors import ConfigError, ImageError, RequestError
from minigpt4_runtime.evaluation.answers import find_picture, read_json_lines
from minigpt4_runtime.messages import Message, TextDelta, image

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.config import SamplingParams
    from minigpt4_runtime.report.ledger import Ledger

LEDGER_KEYS = ("asked_of", "max_new_tokens", "question_id", "image", "picture", "question")
_AT_ONCE = 32
_SHOWN_IDS = 5

Label = Literal["yes", "no"]
Item = TypeVar("Item")
# A question on its way: its deltas, its answer known before, or why it cannot be asked.
_Asked: TypeAlias = "Iterable[TextDelta] | str | RequestError"


@dataclass(frozen=True)
class Question:
    """One line of a file of questions."""

    question_id: int | str
    image: str
    text: str
    label: Label


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a file such as coco_pope_random.json.

    Raises:
        ConfigError: a line is something else, a number comes twice, or there is no line at all.
    """
    questions: dict[int | str, Question] = {}
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
        questions[question_id] = Question(question_id, str(name), str(text), label)
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


def read_answers(path: Path, questions: Sequence[Question]) -> dict[int | str, str]:
    """Read collected answers: by question_id, or else, as POPE has it, in the questions' order.

    The answer is `answer`, or `text` as LLaVA's scripts write it.

    Raises:
        ConfigError: a line is something else, or the answers do not belong to the questions.
    """
    lines = list(read_json_lines(path, "answer to a POPE question"))
    if all("question_id" in record for _, record in lines):
        records = [(_read_id(record, number, path), record) for number, record in lines]
    elif len(lines) == len(questions):
        records = [
            (question.question_id, record)
            for question, (_, record) in zip(questions, lines, strict=True)
        ]
        for question, (_, record) in zip(questions, lines, strict=True):
            _check_same_question(question, record, path)
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


def name_strays(
    path: Path, answers: Mapping[int | str, str], questions: Sequence[Question]
) -> tuple[str, ...]:
    """Sentences about the questions that a file of answers lacks, and the answers it has beside."""
    asked = [question.question_id for question in questions]
    known = set(asked)
    missing = [question_id for question_id in asked if question_id not in answers]
    strays = [question_id for question_id in answers if question_id not in known]
    sentences = []
    if missing:
        sentences.append(
            f"{path} has no answer to {_count(missing, 'question')} ({_show(missing)})."
        )
    if strays:
        verb = "belongs" if len(strays) == 1 else "belong"
        sentences.append(
            f"{_count(strays, 'answer')} of {path} {verb} to no question ({_show(strays)})."
        )
    return tuple(sentences)


def _count(ids: Sequence[int | str], noun: str) -> str:
    return f"{len(ids)} {noun}{'s' if len(ids) > 1 else ''}"


def _show(ids: Sequence[int | str]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    return f"{shown} …" if len(ids) > _SHOWN_IDS else shown


def _check_same_question(question: Question, record: Mapping[str, Any], path: Path) -> None:
    asked = str(record.get("question", question.text))
    if asked.casefold() != question.text.casefold():
        raise ConfigError(
            f"{path} answers {asked!r} where the question is {question.text!r}. The answers must "
            "stand in the questions' order."
        )


def ask(
    model: MiniGPT4,
    questions: Sequence[Question],
    *,
    images_dir: Path,
    prompt: str,
    sampling: SamplingParams,
    ledger: Ledger,
    asked_of: str,
    on_question: Callable[[], None] = lambda: None,
) -> tuple[dict[int | str, str], tuple[str, ...]]:
    """Ask what the ledger does not know yet, many at once: answers by question, and what failed.

    In `prompt`, {question} stands for the question. `asked_of` names the model in the ledger.
    """
    answers: dict[int | str, str] = {}
    faults: dict[str, None] = {}  # A picture has several questions: it is told once.
    locate = functools.cache(partial(_locate, images_dir))  # And it is read once.

    def begin(question: Question) -> tuple[Question, dict[str, Any], _Asked]:
        try:
            path, digest = locate(question.image)
        except ImageError as error:
            return question, {}, error
        text = prompt.replace("{question}", question.text)
        about = {
            "asked_of": asked_of,
            "max_new_tokens": sampling.max_new_tokens,
            "question_id": question.question_id,
            "image": question.image,
            "picture": digest,
            "question": text,
        }
        known = ledger.find(**about)
        submitted = known["answer"] if known else _submit(model, path, text, sampling)
        return question, about, submitted

    for question, about, asked in _ahead(map(begin, questions), _AT_ONCE):
        answer = _finish(asked)
        if isinstance(answer, RequestError):
            faults[str(answer)] = None
        else:
            answers[question.question_id] = answer
            if ledger.find(**about) is None:
                ledger.add({**about, "label": question.label, "answer": answer})
        on_question()
    return answers, tuple(faults)


def _ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, each begun so many steps before it is given: answers grow meanwhile."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting.popleft()
    yield from waiting


def _locate(images_dir: Path, name: str) -> tuple[Path, str]:
    """Where a question's picture lies, and the digest of its bytes: names come twice."""
    found = find_picture(images_dir, name)
    if found is None:
        raise ImageError(f"The folder {images_dir} lacks {name}.")
    path = images_dir / found
    try:
        return path, hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}).") from None


def _submit(model: MiniGPT4, path: Path, text: str, sampling: SamplingParams) -> _Asked:
    try:
        return model.submit([Message("user", (image(path), text))], sampling)
    except RequestError as error:
        return error


def _finish(asked: _Asked) -> str | RequestError:
    if isinstance(asked, (str, RequestError)):
        return asked
    try:
        *_, last = asked
    except RequestError as error:
        return error
    assert last.reply is not None, "a stream ends with its reply"
    return last.reply.text
