"""POPE: whether the model sees things that are not in the image.

By Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv:2305.10355.

Owns   the published layouts of questions and answers, and the asking in dialogues.
Takes  files of questions and answers; gives PopeQuestions, and answers by their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import ask

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

Label = Literal["yes", "no"]


@dataclass(frozen=True)
class PopeQuestion:
    """One line of a file of questions."""

    question_id: int | str
    image: str
    text: str
    label: Label
    chat: int | str | None = None  # The dialogue that it belongs to, and its place there.
    turn: int = 0


def read_questions(path: Path) -> tuple[PopeQuestion, ...]:
    """Read a file such as coco_pope_random.json, or PAI's coco_pope_chat_random.json.

    In the latter a line has chat_id, and lists of texts and labels: the turns of a dialogue. The
    third question of chat 5 has the id "5#3".

    Raises:
        ConfigError: a line is not a question, an id occurs twice, or the file is empty.
    """
    questions: dict[int | str, PopeQuestion] = {}
    lines = read_json_lines(path, "POPE question")
    for number, (record, chat, turn) in ((n, each) for n, line in lines for each in _turns(line)):
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
        questions[question_id] = PopeQuestion(question_id, str(name), str(text), label, chat, turn)
    if not questions:
        raise ConfigError(f"{path} holds no question.")
    return tuple(questions.values())


def _turns(
    record: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], int | str | None, int]]:
    """The questions of a line, each with its dialogue and its place there.

    Raises:
        ConfigError: there are not as many labels as questions.
    """
    chat, texts, labels = (record.get(key) for key in ("chat_id", "text", "label"))
    if chat is None or not isinstance(texts, list) or not isinstance(labels, list):
        yield record, None, 0
        return
    if len(texts) != len(labels):
        raise ConfigError(f"Chat {chat} has {len(texts)} texts and {len(labels)} labels.")
    for turn, (text, label) in enumerate(zip(texts, labels, strict=True)):
        one = {"question_id": f"{chat}#{turn + 1}", "text": text, "label": label}
        yield {**record, **one}, chat, turn


def ask_in_dialogues(
    model: MiniGPT4, questions: Sequence[PopeQuestion], **settings: Any
) -> tuple[dict[int | str, str], tuple[str, ...]]:
    """Ask like `asking.ask`, each question behind the earlier ones of its dialogue.

    All dialogues' first questions are asked at once, then all second ones. One whose earlier
    questions have no answer is not asked.
    """
    answers: dict[int | str, str] = {}
    faults: dict[str, None] = {}
    chats: dict[int | str | None, list[PopeQuestion]] = {}
    for question in sorted(questions, key=lambda each: each.turn):
        chats.setdefault(question.chat, []).append(question)

    def before(question: PopeQuestion) -> list[tuple[str, str]]:
        earlier = chats[question.chat][: question.turn]
        return [(each.text, answers[each.question_id]) for each in earlier]

    for turn in sorted({question.turn for question in questions}):
        asked = [
            question
            for question in questions
            if question.turn == turn
            and all(each.question_id in answers for each in chats[question.chat][:turn])
        ]
        given, failed = ask(model, asked, before=before, **settings)
        answers |= given
        faults |= dict.fromkeys(failed)
    return answers, tuple(faults)


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

    The answer is `answer`, or `text` as LLaVA's scripts write it, or `ans` as PAI's do.

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
        answer = record.get("answer", record.get("text", record.get("ans")))
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
    asked = str(record.get("query", record.get("question", question.text)))
    if asked.casefold() != question.text.casefold():
        raise ConfigError(
            f"{path} answers {asked!r} where the question is {question.text!r}. The answers must "
            "stand in the questions' order."
        )
    return question.question_id
