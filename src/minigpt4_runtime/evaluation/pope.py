"""POPE: does the model see things that are not there?

By Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv:2305.10355.

Owns   the published layout of questions and answers, how an answer is read as yes or no, and the
       counts.
Takes  questions, a model to ask or answers already collected; gives a PopeReport.
Never  chooses the questions.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from minigpt4_runtime.errors import ConfigError, ImageError, RequestError
from minigpt4_runtime.evaluation.answers import find_picture, read_json_lines
from minigpt4_runtime.messages import Message, TextDelta, image
from minigpt4_runtime.pixels import open_rgb
from minigpt4_runtime.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.config import SamplingParams
    from minigpt4_runtime.report.ledger import Ledger
    from minigpt4_runtime.report.page import Card

LEDGER_KEYS = ("asked_of", "max_new_tokens", "question_id", "image", "question")
_AT_ONCE = 32
_SHOWN_CASES = 50

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


@dataclass(frozen=True)
class Verdict:
    """A question and what was answered."""

    question: Question
    answer: str

    @property
    def read_as(self) -> Label:
        """What the answer counts as."""
        return read_answer(self.answer)

    @property
    def is_right(self) -> bool:
        """Whether that is the label."""
        return self.read_as == self.question.label


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a file such as coco_pope_random.json.

    Raises:
        ConfigError: a line is something else, a number comes twice, or there is no line at all.
    """
    questions: dict[Any, Question] = {}
    for number, record in read_json_lines(path, "POPE question"):
        try:
            question_id, name, text, label = (
                record[key] for key in ("question_id", "image", "text", "label")
            )
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


def read_answers(path: Path, questions: Sequence[Question]) -> dict[int | str, str]:
    """Read collected answers: by question_id, or else, as POPE has it, in the questions' order.

    The answer is `answer`, or `text` as LLaVA's scripts write it.

    Raises:
        ConfigError: a line is something else, or the answers do not belong to the questions.
    """
    records = [record for _, record in read_json_lines(path, "answer to a POPE question")]
    if not all("question_id" in record for record in records):
        if len(records) != len(questions):
            raise ConfigError(
                f"{path} has {len(records)} answers without question_id to {len(questions)} "
                "questions. In the questions' order there must be one for each."
            )
        for question, record in zip(questions, records, strict=True):
            _check_same_question(question, record, path)
        records = [
            {**record, "question_id": question.question_id}
            for question, record in zip(questions, records, strict=True)
        ]
    answers = {}
    for record in records:
        answer = record.get("answer", record.get("text"))
        if not isinstance(answer, str):
            raise ConfigError(f"{path}: question {record['question_id']} has no answer as text.")
        answers[record["question_id"]] = answer
    if not answers.keys() & {question.question_id for question in questions}:
        raise ConfigError(f"{path} answers none of the questions. Name the file that belongs here.")
    return answers


def _check_same_question(question: Question, record: Mapping[str, Any], path: Path) -> None:
    asked = str(record.get("question", question.text))
    if asked.casefold() != question.text.casefold():
        raise ConfigError(
            f"{path} answers {asked!r} where the question is {question.text!r}. The answers must "
            "stand in the questions' order."
        )


def read_answer(answer: str) -> Label:
    """Read an answer as POPE's own script does, so that published numbers compare.

    It is no if its first sentence has the word No, no or not, and yes otherwise.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_unclear(answer: str) -> bool:
    """Whether the first sentence says neither yes nor no, so that it counted as yes unsaid."""
    return not re.search(r"\b(yes|no|not)\b", answer.split(".")[0], re.IGNORECASE)


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

    def begin(question: Question) -> tuple[Question, dict[str, Any], _Asked]:
        about = {
            "asked_of": asked_of,
            "max_new_tokens": sampling.max_new_tokens,
            "question_id": question.question_id,
            "image": question.image,
            "question": prompt.replace("{question}", question.text),
        }
        known = ledger.find(**about)
        return (
            question,
            about,
            known["answer"] if known else _submit(model, about, images_dir, sampling),
        )

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


def _submit(
    model: MiniGPT4, about: Mapping[str, Any], images_dir: Path, sampling: SamplingParams
) -> _Asked:
    found = find_picture(images_dir, about["image"])
    if found is None:
        return ImageError(f"The folder {images_dir} lacks {about['image']}.")
    try:
        message = Message("user", (image(images_dir / found), about["question"]))
        return model.submit([message], sampling)
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


def judge(
    questions: Sequence[Question],
    answers: Mapping[int | str, str],
    *,
    images_dir: Path,
    faults: Sequence[str] = (),
) -> PopeReport:
    """Count what the answers say.

    Raises:
        ConfigError: no question has an answer.
    """
    verdicts = tuple(
        Verdict(question, answers[question.question_id])
        for question in questions
        if question.question_id in answers
    )
    if not verdicts:
        raise ConfigError(" ".join(["No question was answered.", *faults]))
    return PopeReport(verdicts, len(questions) - len(verdicts), tuple(faults), images_dir)


@dataclass(frozen=True)
class PopeReport:
    """Counts over the questions that have an answer; "yes" is what is looked for."""

    verdicts: tuple[Verdict, ...]
    num_unanswered: int
    left_out: tuple[str, ...]
    images_dir: Path

    def count(self, label: Label, read_as: Label) -> int:
        """How many questions with that label were read so."""
        return sum(v.question.label == label and v.read_as == read_as for v in self.verdicts)

    @property
    def num_unclear(self) -> int:
        """How many answers say neither yes nor no; they count as yes."""
        return sum(is_unclear(verdict.answer) for verdict in self.verdicts)

    @property
    def rates(self) -> dict[str, float | None]:
        """The five published numbers, from 0 to 1; None where nothing can be divided."""
        true_yes, false_yes = self.count("yes", "yes"), self.count("no", "yes")
        true_no, false_no = self.count("no", "no"), self.count("yes", "no")
        return {
            "accuracy": _share(true_yes + true_no, len(self.verdicts)),
            "precision": _share(true_yes, true_yes + false_yes),
            "recall": _share(true_yes, true_yes + false_no),
            "f1": _share(2 * true_yes, 2 * true_yes + false_yes + false_no),
            "yes_ratio": _share(true_yes + false_yes, len(self.verdicts)),
        }

    def tables(self) -> list[Table]:
        """The rates, and what was answered to what."""
        rates = Table(
            (*(Column(name.replace("_", " "), ".1%") for name in self.rates),
             Column("questions"), Column("unanswered"), Column("unclear")),
            ((*self.rates.values(), len(self.verdicts), self.num_unanswered, self.num_unclear),),
        )  # fmt: skip
        labels: tuple[Label, Label] = ("yes", "no")
        counts = Table(
            (Column("right is"), Column("read as yes"), Column("read as no")),
            tuple((label, *(self.count(label, read) for read in labels)) for label in labels),
        )
        return [rates, counts]

    def as_text(self) -> str:
        """The tables."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def as_mapping(self) -> dict[str, Any]:
        """Everything."""
        return {
            **self.rates,
            "questions": len(self.verdicts),
            "unanswered": self.num_unanswered,
            "unclear": self.num_unclear,
            "true_yes": self.count("yes", "yes"),
            "false_yes": self.count("no", "yes"),
            "true_no": self.count("no", "no"),
            "false_no": self.count("yes", "no"),
            "left_out": list(self.left_out),
            "answers": [
                {**vars(v.question), "answer": v.answer, "read_as": v.read_as}
                for v in self.verdicts
            ],
        }

    def as_rows(self) -> Table:
        """One row for each question."""
        names = ("question_id", "image", "question", "label", "read_as", "is_right", "answer")
        return Table(
            tuple(Column(name) for name in names),
            tuple(
                (v.question.question_id, v.question.image, v.question.text, v.question.label,
                 v.read_as, int(v.is_right), v.answer)
                for v in self.verdicts
            ),
        )  # fmt: skip

    def as_page(self) -> str:
        """The rates, and the wrong answers: first the things that are not there."""
        from minigpt4_runtime.report.chart import draw
        from minigpt4_runtime.report.page import Gallery, Paragraph, render

        wrong = [verdict for verdict in self.verdicts if not verdict.is_right]
        wrong.sort(key=lambda verdict: verdict.question.label)
        shown = wrong[:_SHOWN_CASES]
        return render(
            "Does it see things that are not there?",
            [
                Paragraph(
                    "POPE asks whether a thing is in the picture; half of the things are not. "
                    "Precision falls with every thing that is seen and not there, recall with "
                    "every thing that is overlooked. An answer counts as no if its first "
                    "sentence has the word no or not, and as yes otherwise; unclear ones have "
                    "neither yes nor no."
                ),
                *self.tables(),
                *(Paragraph(f"Left out: {sentence}") for sentence in self.left_out),
                draw("The five rates of POPE.", self._paint_rates),
                Gallery(
                    f"Wrong answers ({len(shown)} of {len(wrong)})",
                    tuple(self._card(verdict) for verdict in shown),
                )
                if shown
                else Paragraph("All answers are right."),
            ],
        )

    def _paint_rates(self, axes: Axes) -> None:
        names = [name.replace("_", " ") for name in self.rates]
        axes.barh(names, [rate or 0 for rate in self.rates.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="rate")

    def _card(self, verdict: Verdict) -> Card:
        from minigpt4_runtime.report.page import Card, Entry, plain, thumbnail

        question = verdict.question
        entries = (
            Entry(question.text, plain(verdict.answer)),
            Entry("Right would be", plain(question.label), is_best=True),
        )
        found = find_picture(self.images_dir, question.image)
        try:
            picture = thumbnail(open_rgb(image(self.images_dir / found))) if found else None
        except ImageError:
            picture = None  # Answers collected elsewhere stand without their pictures.
        return Card(f"{question.image} · question {question.question_id}", entries, picture)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
