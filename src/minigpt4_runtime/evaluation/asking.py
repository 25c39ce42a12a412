"""Questions about images, put to a model many at once, so that a stopped run goes on.

Owns   the asking, the ledger's record of an answer, and answers that were collected elsewhere.
Takes  questions of any published kind, and a model or a file; gives answers by the questions' ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError, ImageError, RequestError
from minigpt4_runtime.evaluation.answers import name_some, read_json_lines
from minigpt4_runtime.evaluation.images import find_image
from minigpt4_runtime.messages import Message, TextDelta, image
from minigpt4_runtime.report.files import read_text
from minigpt4_runtime.report.ledger import Ledger

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

# A prompt with this is raw: it has a template of its own.
IMAGE_PLACE = "<ImageHere>"
LEDGER_KEYS = ("asked_of", "max_new_tokens", "question_id", "image", "picture", "question")
_AT_ONCE = 32

Id: TypeAlias = int | str
Item = TypeVar("Item")
# A running answer, a known answer, or the reason why the question cannot be asked.
_Pending: TypeAlias = "Iterable[TextDelta] | str | RequestError"


class Question(Protocol):
    """What all questions have. `image` is the name of a file."""

    @property
    def question_id(self) -> Id:
        """Unique within a file."""

    @property
    def image(self) -> str:
        """The name of its image."""

    @property
    def text(self) -> str:
        """The question itself."""


Q = TypeVar("Q", bound=Question)


def ask(  # noqa: PLR0913 - what is asked, of what, and where it is noted.
    model: MiniGPT4,
    questions: Sequence[Q],
    *,
    images_dir: Path,
    prompt: str,
    sampling: SamplingParams,
    ledger: Ledger,
    asked_of: str,
    right: Callable[[Q], Mapping[str, Any]] = lambda _: {},
    on_question: Callable[[], None] = lambda: None,
    before: Callable[[Q], Sequence[tuple[str, str]]] = lambda _: (),
    prompt_later: str | None = None,
) -> tuple[dict[Id, str], tuple[str, ...]]:
    """Ask the questions that are not in the ledger, many at once; give answers and failures.

    In `prompt`, {question} stands for the question. One that says where the picture stands is taken
    as it is, see `MiniGPT4.submit_raw`. `before` gives the questions and answers before this one in
    its dialogue. In a raw dialogue `prompt_later` is how those after the first are put, and the end
    id stands behind each answer. `asked_of` names the model in the ledger, which also keeps what is
    `right`.
    """
    answers: dict[Id, str] = {}
    faults: dict[str, None] = {}  # An image has several questions, and is named once.
    locate = functools.cache(partial(locate_image, images_dir))  # Each image is read once.

    def begin(question: Q) -> tuple[Q, dict[str, Any], _Pending]:
        try:
            path, digest = locate(question.image)
            turns = _turns(question.text, before(question), prompt, prompt_later or prompt)
            text = "\n".join(turns)
            if IMAGE_PLACE in prompt:
                text = "".join(turn + "</s>" * (number % 2) for number, turn in enumerate(turns))
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
            if IMAGE_PLACE in prompt:
                return question, about, model.submit_raw(text, [image(path)], sampling)
            messages = [
                Message("assistant" if number % 2 else "user", (turn,))
                for number, turn in enumerate(turns)
            ]
            messages[0] = Message("user", (image(path), turns[0]))
            return question, about, model.submit(messages, sampling)
        except RequestError as error:
            return question, {}, error

    for question, about, pending in ahead(map(begin, questions)):
        answer = _finish(pending)
        if isinstance(answer, RequestError):
            faults[str(answer)] = None
        else:
            answers[question.question_id] = answer
            if ledger.find(**about) is None:
                ledger.add({**about, **right(question), "answer": answer})
        on_question()
    return answers, tuple(faults)


def _turns(text: str, before: Sequence[tuple[str, str]], prompt: str, later: str) -> list[str]:
    """What is said up to a question, by user and assistant in turn."""
    turns: list[str] = []
    for asked, answer in (*before, (text, "")):
        turns += [(later if turns else prompt).replace("{question}", asked), answer]
    return turns[:-1]


def read_answers(path: Path, questions: Sequence[Question]) -> dict[Id, str]:
    """Read collected answers: records with question_id and answer, a line each or as a JSON list.

    Or one JSON object, from ids to answers; an answer in a list of one is that answer.

    Raises:
        ConfigError: a record is no answer, or no answer belongs to the questions.
    """
    # In a JSON object all keys are text.
    ids = {str(question.question_id): question.question_id for question in questions}
    answers: dict[Id, str] = {}
    for place, given_id, answer in _records(path):
        if isinstance(given_id, bool) or not isinstance(given_id, (int, str)):
            raise ConfigError(f"{place} has no question_id. Give each answer the question's.")
        if not isinstance(answer, str):
            raise ConfigError(f"{place} has no answer as text.")
        question_id = ids.get(str(given_id), given_id)
        if question_id in answers:
            raise ConfigError(
                f"{path} answers question {question_id} twice. Give the answers of one run."
            )
        answers[question_id] = answer
    if not answers.keys() & set(ids.values()):
        raise ConfigError(f"{path} answers none of the questions. Name the file that belongs here.")
    return answers


def _records(path: Path) -> Iterator[tuple[str, object, object]]:
    """The place, the id and the answer of each record in a file."""
    content = read_json(path)
    if isinstance(content, dict) and "answer" not in content:
        for question_id, answer in content.items():
            is_single = isinstance(answer, list) and len(answer) == 1
            yield (
                f"Question {question_id} of {path}",
                question_id,
                answer[0] if is_single else answer,
            )
        return
    places = (
        [(f"Answer {number} of {path}", record) for number, record in enumerate(content, start=1)]
        if isinstance(content, list)
        else [(f"Line {n} of {path}", record) for n, record in read_json_lines(path, "answer")]
    )
    for place, record in places:
        given = record if isinstance(record, dict) else {}
        yield (
            place,
            given.get("question_id", given.get("questionId")),
            given.get("answer", given.get("prediction")),
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except ValueError:
        return None


def name_strays(
    path: Path, answers: Mapping[Id, str], questions: Sequence[Question]
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


def pair(
    questions: Sequence[Q], answers: Mapping[Id, str], faults: Sequence[str]
) -> list[tuple[Q, str]]:
    """The questions that have an answer, each with it.

    Raises:
        ConfigError: none has; the message ends with the `faults`.
    """
    pairs = [(each, answers[each.question_id]) for each in questions if each.question_id in answers]
    if not pairs:
        raise ConfigError(" ".join(["No question was answered.", *faults]))
    return pairs


def share(part: float, whole: int) -> float | None:
    """A part of the whole; None of nothing."""
    return part / whole if whole else None


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, taken some ahead, so that their answers run together."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == _AT_ONCE:
            yield waiting.popleft()
    yield from waiting


def locate_image(images_dir: Path, name: str) -> tuple[Path, str]:
    """The path of a question's image, and the digest of its bytes, since names are not unique.

    Raises:
        ImageError: the folder has no such image, or it cannot be read.
    """
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
