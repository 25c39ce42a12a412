"""Questions with given answers, of which the model finds one the likeliest.

As SEED-Bench (Li et al., arXiv:2307.16125) asks models that are not sure to name a letter.

Owns   the layouts of such questions, and the asking by likelihood.
Takes  a file of questions and a model; gives the scores of each question's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import IMAGE_PLACE, Id, locate_image, read_json
from minigpt4_runtime.messages import image
from minigpt4_runtime.report.ledger import Ledger

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

LEDGER_KEYS = ("asked_of", "question_id", "image", "picture", "question", "choices")
_LETTERS = "ABCDEFGHIJ"
_WANTED = "Give the questions of SEED-Bench, or records with image, question, choices and answer."


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its answers, and which of them is right. `kind` is what the numbers are by."""

    question_id: Id
    image: str
    text: str
    choices: tuple[str, ...]
    right: int
    kind: str = ""


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

    `prompt` is as in `asking.ask`. An answer's ids are those of its text.
    """
    lab = model.lab()
    found: dict[Id, tuple[Likelihood, ...]] = {}
    faults: dict[str, None] = {}
    for question in questions:
        try:
            path, digest = locate_image(images_dir, question.image)
            about = {
                "asked_of": asked_of, "question_id": question.question_id,
                "image": question.image, "picture": digest,
                "question": prompt.replace("{question}", question.text),
                "choices": "\n".join(question.choices),
            }  # fmt: skip
            if (known := ledger.find(**about)) is None:
                text, picture = str(about["question"]), image(path)
                asked = (
                    lab.prompt(text, [picture])
                    if IMAGE_PLACE in prompt
                    else lab.prompt([{"role": "user", "content": [picture, text]}])
                )
                candidates = [lab.ids_of(each) for each in question.choices]
                scores = lab.score(asked, candidates).tolist()
                pairs = [[score, len(ids)] for score, ids in zip(scores, candidates, strict=True)]
                ledger.add(known := {**about, "right": question.right, "likelihoods": pairs})
            found[question.question_id] = tuple(Likelihood(*pair) for pair in known["likelihoods"])
        except RequestError as error:
            faults[str(error)] = None
        on_question()
    return found, tuple(faults)
