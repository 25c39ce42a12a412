"""Questions with given answers, of which the model finds one the likeliest.

As SEED-Bench (Li et al., arXiv:2307.16125) asks models that are not sure to name a letter.

Owns   the layouts of such questions, and the asking by likelihood.
Takes  a file of questions and a model; gives the scores of each question's answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import IMAGE_PLACE, Id, ahead, locate_image, read_json
from minigpt4_runtime.messages import Message, image
from minigpt4_runtime.report.ledger import Ledger

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

LEDGER_KEYS = ("asked_of", "question_id", "image", "picture", "question", "choices")
_LETTERS = "ABCDEFGHIJ"
# The scores to come, known pairs of score and number of ids, or why the question cannot be asked.
_Pending: TypeAlias = "Iterable[tuple[float, ...]] | list[Any] | RequestError"
_Begun: TypeAlias = "tuple[ChoiceQuestion, dict[str, Any], _Pending]"
_WANTED = "Give the questions of SEED-Bench, or records with image, question, choices and answer."


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its answers, and which of them is right. `kind` is what the numbers are by.

    Questions that are one, asked about several pictures, have one `whole`.
    """

    question_id: Id
    image: str
    text: str
    choices: tuple[str, ...]
    right: int
    kind: str = ""
    whole: Id = ""

    @property
    def name(self) -> Id:
        """The id of the whole, where it is a part, or its own."""
        return self.whole or self.question_id


@dataclass(frozen=True)
class Likelihood:
    """What a model expects of an answer: the log-probability of its ids, and their number."""

    logprob: float
    num_ids: int


def read_questions(path: Path) -> tuple[ChoiceQuestion, ...]:
    """Read SEED-Bench's file, or records in a list or a line each.

    A record has image (data_id, or IconQA's image_id, the name of a folder), question, answer, and
    choices as a list or choice_a, choice_b and so on. The answer is a letter, a number from 0, or
    the answer's text. SEED-Bench's videos are left out.

    Raises:
        ConfigError: a record is no such question, or an id comes twice.
    """
    content = read_json(path)
    kinds: Mapping[str, str] = {}
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        kinds = {str(number): name for name, number in content.get("question_type", {}).items()}
        content = content["questions"]
    if not isinstance(content, list):
        content = [record for _, record in read_json_lines(path, "question with choices")]
    questions: dict[Id, ChoiceQuestion] = {}
    for number, record in enumerate(content, start=1):
        place = f"Question {number} of {path}"
        if not isinstance(record, dict):
            raise ConfigError(f"{place} is no object. {_WANTED}")
        if record.get("data_type", "image") != "image":
            continue
        question = _read(record, number, place, kinds)
        if question.question_id in questions:
            raise ConfigError(f"{place}: question {question.question_id} comes twice.")
        questions[question.question_id] = question
    if not questions:
        raise ConfigError(f"{path} holds no question about a picture. {_WANTED}")
    return tuple(questions.values())


def _read(
    record: Mapping[str, Any], number: int, place: str, kinds: Mapping[str, str]
) -> ChoiceQuestion:
    named = [f"choice_{letter.lower()}" for letter in _LETTERS]
    choices = record.get("choices", [record[name] for name in named if name in record])
    name, text = record.get("image", record.get("data_id")), record.get("question")
    if name is None and isinstance(folder := record.get("image_id"), str):
        name = f"{folder}/image.png"
    are_texts = isinstance(choices, list) and all(isinstance(each, str) for each in choices)
    if not (are_texts and len(choices) > 1 and isinstance(name, str) and isinstance(text, str)):
        raise ConfigError(f"{place} lacks an image, a question or its choices. {_WANTED}")
    answer = record.get("answer")
    if isinstance(answer, str):
        letter = _LETTERS.find(answer.upper()) if len(answer) == 1 else -1
        answer = choices.index(answer) if answer in choices else letter
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(f"{place}: the answer {record.get('answer')!r} is none of its choices.")
    kind = str(record.get("kind", record.get("question_type_id", "")))
    question_id = record.get("question_id", number)
    return ChoiceQuestion(question_id, name, text, tuple(choices), answer, kinds.get(kind, kind))


def ask(
    model: MiniGPT4,
    questions: Sequence[ChoiceQuestion],
    *,
    images_dir: Path,
    prompt: str,
    ledger: Ledger,
    asked_of: str,
    on_question: Callable[[], None] = lambda: None,
) -> tuple[dict[Id, tuple[Likelihood, ...]], tuple[str, ...]]:
    """How likely each answer to each question is; and sentences about what could not be asked.

    `prompt` is as in `asking.ask`. An answer's ids are those of its text. Many questions are asked
    at once.
    """
    found: dict[Id, tuple[Likelihood, ...]] = {}
    faults: dict[str, None] = {}
    locate = functools.cache(partial(locate_image, images_dir))  # Each image is read once.

    def begin(question: ChoiceQuestion) -> _Begun:
        try:
            path, digest = locate(question.image)
            text = prompt.replace("{question}", question.text)
            about = {
                "asked_of": asked_of, "question_id": question.question_id,
                "image": question.image, "picture": digest, "question": text,
                "choices": "\n".join(question.choices),
            }  # fmt: skip
            if (known := ledger.find(**about)) is not None:
                return question, about, known["likelihoods"]
            if IMAGE_PLACE in prompt:
                return question, about, model.submit_score(text, question.choices, [image(path)])
            message = Message("user", (image(path), text))
            return question, about, model.submit_score([message], question.choices)
        except RequestError as error:
            return question, {}, error

    for question, about, pending in ahead(map(begin, questions)):
        try:
            pairs = _finish(model, question, pending)
            if ledger.find(**about) is None:
                ledger.add({**about, "right": question.right, "likelihoods": pairs})
            found[question.question_id] = tuple(Likelihood(*pair) for pair in pairs)
        except RequestError as error:
            faults[str(error)] = None
        on_question()
    return found, tuple(faults)


def _finish(model: MiniGPT4, question: ChoiceQuestion, pending: _Pending) -> list[Any]:
    """The log-probability of each answer, and its number of ids."""
    if isinstance(pending, list):
        return pending
    if isinstance(pending, RequestError):
        raise pending
    (scores,) = pending
    # A text's first id is the one that begins every text.
    counts = [len(model.encode_text(each)) - 1 for each in question.choices]
    return [[score, count] for score, count in zip(scores, counts, strict=True)]
