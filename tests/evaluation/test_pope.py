"""POPE's files are read as published, and the numbers are those of its own script."""

import itertools
import json
import random

import pytest

from minigpt4_runtime import ConfigError, SamplingParams
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.evaluation import asking, pope
from minigpt4_runtime.evaluation.pope import PopeQuestion
from minigpt4_runtime.evaluation.pope_report import (
    READINGS,
    PopeReport,
    PopeVerdict,
    is_unclear,
    judge,
)
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import Reply, TextDelta, Usage, read_messages
from minigpt4_runtime.report.ledger import Ledger

# Made by hand in the published layout. The third answer is wrong, the fourth says neither.
QUESTIONS = """\
{"question_id": 1, "image": "1.png", "text": "Is there a dog in the image?", "label": "yes"}
{"question_id": 2, "image": "1.png", "text": "Is there a cat in the image?", "label": "no"}
{"question_id": 3, "image": "2.png", "text": "Is there a dog in the image?", "label": "no"}
{"question_id": 4, "image": "2.png", "text": "Is there a car in the image?", "label": "yes"}
{"question_id": 5, "image": "3.png", "text": "Is there a bus in the image?", "label": "yes"}
"""
ANSWERS = """\
{"question": "is there a dog in the image?", "answer": "Yes, there is a dog. No cat, though."}
{"question": "is there a cat in the image?", "answer": "No, there is no cat."}
{"question": "is there a dog in the image?", "answer": "yes"}
{"question": "is there a car in the image?", "answer": "A red car"}
{"question": "is there a bus in the image?", "answer": "There is not a bus"}
"""


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


@pytest.fixture
def questions(write):
    return pope.read_questions(write("coco_pope_random.json", QUESTIONS))


def test_published_files(write, questions, images):
    answers = pope.read_answers(write("answers.json", ANSWERS), questions)
    report = judge(questions, answers, images_dir=images)
    # By hand: yes and right twice (dog, car), yes and wrong once, no and right once, no and wrong
    # once.
    assert report.as_mapping() | {"answers": []} == {
        "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5,
        "reading": "first-sentence", "questions": 5, "unanswered": 0, "unclear": 1,
        "true_yes": 2, "false_yes": 1, "true_no": 1,
        "false_no": 1, "left_out": [], "as_published": "", "answers": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("yes", "yes"),
        ("Yes, there is a dog in the image.", "yes"),
        ("No", "no"),
        ("no, there isn't", "no"),
        ("No, there is no dog. Yes.", "no"),
        ("There is not a dog", "no"),
        ("Yes. But no cat.", "yes"),
        # As in the published script, whatever one may think of it.
        ("NO", "yes"),
        ("Nothing", "yes"),
        ("", "yes"),
    ],
)
def test_an_answer_is_read_as_the_published_script_reads_it(answer, label):
    assert READINGS["first-sentence"](answer) == label


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("Yes, there is a dog.", ("yes", "yes", "yes")),
        ("No.", ("no", "no", "no")),
        ("Yes. But no cat.", ("yes", "no", "no")),
        ("There isn't one.", ("yes", "no", "no")),
        ("NO", ("yes", "no", "no")),
        ("Yes, there is snow.", ("yes", "yes", "no")),
        ("That is false.", ("yes", "yes", "no")),
        # Published scripts, whatever one may think of them.
        ("No! There is none", ("yes", "yes", "no")),
    ],
)
def test_papers_read_answers_differently(answer, labels, images):
    asked = (PopeQuestion(1, "1.png", "?", "no"),)
    reports = [judge(asked, {1: answer}, images_dir=images, reading=each) for each in READINGS]
    assert tuple(report.verdicts[0].read_as for report in reports) == labels
    assert [report.as_mapping()["reading"] for report in reports] == list(READINGS)
    with pytest.raises(ConfigError, match="reading is 'last'"):
        judge(asked, {1: answer}, images_dir=images, reading="last")


@pytest.mark.parametrize(
    ("answer", "unclear"),
    [("", True), ("A dog.", True), ("A dog. Yes.", True), ("NO", False), ("yes!", False),
     ("Notable", True)],
)  # fmt: skip
def test_an_answer_that_says_neither_is_unclear(answer, unclear):
    assert is_unclear(answer) == unclear


def test_rates_agree_with_counting_by_sets(images):
    """Precision and recall as shares of sets, F1 as their harmonic mean, on random answers."""
    draws = random.Random(0)
    verdicts = tuple(
        PopeVerdict(
            PopeQuestion(n, "1.png", "?", draws.choice(["yes", "no"])), draws.choice(["Yes", "No"])
        )
        for n in range(300)
    )
    report = PopeReport(verdicts, 0, (), images)
    is_yes = {v.question.question_id for v in verdicts if v.question.label == "yes"}
    said_yes = {v.question.question_id for v in verdicts if v.answer == "Yes"}
    precision, recall = (len(is_yes & said_yes) / len(each) for each in (said_yes, is_yes))
    assert report.rates == pytest.approx({
        "accuracy": 1 - len(is_yes ^ said_yes) / 300,
        "precision": precision,
        "recall": recall,
        "f1": 2 / (1 / precision + 1 / recall),
        "yes_ratio": len(said_yes) / 300,
    })  # fmt: skip


def test_nothing_is_divided_by_nothing(images):
    verdicts = (PopeVerdict(PopeQuestion(1, "1.png", "?", "no"), "No"),)
    rates = PopeReport(verdicts, 0, (), images).rates
    assert rates == {"accuracy": 1, "precision": None, "recall": None, "f1": None, "yes_ratio": 0}
    assert "–" in PopeReport(verdicts, 0, (), images).as_text()


def test_answers_by_number_in_any_order(write, questions):
    lines = [{"question_id": 3, "text": "No"}, {"question_id": 1, "answer": "Yes"}]
    path = write("answers.jsonl", "\n".join(map(json.dumps, lines)))
    assert pope.read_answers(path, questions) == {3: "No", 1: "Yes"}


def test_what_has_no_counterpart_is_named(tmp_path, questions):
    path = tmp_path / "a.json"
    assert asking.name_strays(path, dict.fromkeys(range(1, 6), "Yes"), questions) == ()
    assert asking.name_strays(path, {1: "Yes", 2: "No", 5: "No", 99: "No"}, questions) == (
        f"{path} has no answer to 2 questions (3, 4).",
        f"{path} has 1 answer (99) to no question.",
    )
    many = dict.fromkeys(range(1, 13), "No")
    assert asking.name_strays(path, many, questions) == (
        f"{path} has 7 answers (6, 7, 8, 9, 10, …) to no question.",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json\n", "Line 1 of .* is no POPE question"),
        ('{"question_id": 1, "image": "a", "text": "?"}\n', "Line 1 of .* has no 'label'"),
        (QUESTIONS.replace('"no"', '"maybe"'), "Line 2 of .*: label is 'maybe'; it must be yes or"),
        (QUESTIONS + QUESTIONS, "Line 6 of .*: question 1 comes twice"),
        (QUESTIONS[:-9], "Line 5 of .* is no POPE question"),
        (QUESTIONS.replace(": 2,", ": [2],"), r"Line 2 of .*: question_id is \[2\]; it must be a"),
        (QUESTIONS.replace(": 3,", ": 3.5,"), r"Line 3 of .*: question_id is 3\.5; it must be a"),
        ("\n", "holds no question"),
    ],
)
def test_questions_of_another_layout(write, content, message):
    with pytest.raises(ConfigError, match=message):
        pope.read_questions(write("q.json", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ANSWERS[: ANSWERS.index("\n") + 1], "1 answers without question_id to 5 questions"),
        ("".join(reversed(ANSWERS.splitlines(keepends=True))), "answers 'is there a bus .* where"),
        (ANSWERS.replace('"yes"', "1"), "question 3 has no answer as text"),
        ('{"question_id": 9, "answer": "Yes"}\n', "answers none of the questions"),
        ("?\n", "Line 1 of .* is no answer to a POPE question"),
        (ANSWERS[:-9], "Line 5 of .* is no answer to a POPE question"),
        ('{"question_id": {}, "answer": "Yes"}\n', "Line 1 of .*: question_id is {}; it must be"),
        ('{"question_id": 1, "answer": "Yes"}\n' * 2, "answers question 1 twice"),
    ],
)
def test_answers_of_another_layout(write, questions, content, message):
    with pytest.raises(ConfigError, match=message):
        pope.read_answers(write("a.json", content), questions)


class Model:
    """Says yes to dogs; opens what it is shown; gives its answers late, as the engine does."""

    def __init__(self, breaks_after=99):
        self.asked, self._breaks_after = [], breaks_after

    def submit(self, messages, sampling):
        (message,) = read_messages(messages)
        picture, question = message.content
        open_rgb(picture)
        if len(self.asked) == self._breaks_after:
            raise KeyboardInterrupt
        self.asked.append(question)
        return self._answer(question)

    def submit_raw(self, text, pictures, sampling):
        (picture,) = pictures
        return self.submit([{"role": "user", "content": [picture, f"raw {text}"]}], sampling)

    def _answer(self, question):
        if "car" in question:
            raise RequestError("The model's numbers overflowed.")
        text = "Yes." if "dog" in question else "No."
        yield TextDelta(text)
        yield TextDelta("", Reply(text, (1,), "stop", Usage(1, 1)))


def ask(model, questions, images, ledger=None, **settings):
    return asking.ask(
        model, questions, images_dir=images,
        **{"prompt": "{question}", "sampling": SamplingParams(max_new_tokens=9), "asked_of": "demo",
           "ledger": ledger or Ledger(None, keys=asking.LEDGER_KEYS), **settings},
    )  # fmt: skip


def test_a_model_is_asked(questions, images):
    model, done = Model(), []
    answers, faults = ask(
        model, questions, images, prompt="Look! {question}", on_question=lambda: done.append(1)
    )
    assert answers == {1: "Yes.", 2: "No.", 3: "Yes.", 5: "No."}
    assert faults == ("The model's numbers overflowed.",)
    assert model.asked[0] == "Look! Is there a dog in the image?"
    assert len(done) == 5
    report = judge(questions, answers, images_dir=images, faults=faults)
    assert (report.num_unanswered, report.left_out) == (1, faults)


def test_a_prompt_that_places_the_picture_is_raw(questions, images):
    model = Model()
    ask(model, questions, images, prompt="###Human: <Img><ImageHere></Img> {question} ###")
    wanted = "raw ###Human: <Img><ImageHere></Img> Is there a dog in the image? ###"
    assert model.asked[0] == wanted


def test_pictures_that_are_missing_or_bad_are_told_once(write, images):
    lines = QUESTIONS.replace("1.png", "bad.png").replace("2.png", "no.png")
    questions = pope.read_questions(write("q.json", lines))
    answers, (bad, missing) = ask(Model(), questions, images)
    assert answers == {5: "No."}
    assert "bad.png is damaged" in bad
    assert missing == f"The folder {images} lacks no.png."
    with pytest.raises(ConfigError, match=r"No question was answered\. .*bad\.png is damaged"):
        judge(questions, {}, images_dir=images, faults=(bad,))


def test_what_was_answered_is_not_asked_again(questions, images, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "_AT_ONCE", 1)
    path = tmp_path / "pope.jsonl"
    ledger = Ledger(path, keys=asking.LEDGER_KEYS)
    with pytest.raises(KeyboardInterrupt):
        ask(Model(breaks_after=3), questions, images, ledger)
    assert len(path.read_text().splitlines()) == 3  # One before the one that was broken off.
    ledger = Ledger(path, keys=asking.LEDGER_KEYS)
    again = Model()
    answers, _ = ask(again, questions, images, ledger)
    assert answers == {1: "Yes.", 2: "No.", 3: "Yes.", 5: "No."}
    assert len(again.asked) == 2  # The car, which failed, and the bus.
    # The ledger itself is a file of answers, as long as it is of one run.
    assert pope.read_answers(path, questions) == answers
    ledger = Ledger(path, keys=asking.LEDGER_KEYS)
    for change in (
        {"asked_of": "int8"},
        {"prompt": "So: {question}"},
        {"sampling": SamplingParams(max_new_tokens=8)},
    ):
        other = Model()
        ask(other, questions, images, ledger, **change)
        assert len(other.asked) == 5, change
    with pytest.raises(
        ConfigError, match=r"answers question 1 twice\. Give the answers of one run"
    ):
        pope.read_answers(path, questions)


def test_another_picture_of_the_same_name_is_asked_about_anew(questions, images, tmp_path):
    ledger = Ledger(tmp_path / "pope.jsonl", keys=asking.LEDGER_KEYS)
    ask(Model(), questions, images, ledger)
    (images / "1.png").write_bytes((images / "9.png").read_bytes())
    again, elsewhere = Model(), Model()
    ask(again, questions, images, ledger)
    assert len(again.asked) == 3  # Both of the new picture, and the car, which failed.
    other = tmp_path / "other"
    other.mkdir()
    for number in (1, 2, 3):
        (other / f"{number}.png").write_bytes((images / f"{number + 3}.png").read_bytes())
    ask(elsewhere, questions, other, ledger)
    assert len(elsewhere.asked) == 5


def test_each_picture_is_read_once_for_all_its_questions(questions, images, monkeypatch):
    read = []
    monkeypatch.setattr(
        asking, "locate_image", lambda *where: read.append(where) or (images / where[1], "")
    )
    ask(Model(), questions, images)
    assert read == [(images, f"{number}.png") for number in (1, 2, 3)]


def test_many_are_on_their_way_at_once(questions, images, monkeypatch):
    monkeypatch.setattr(asking, "_AT_ONCE", 3)
    waiting = itertools.count()
    most = []

    class Slow(Model):
        def _answer(self, question):
            most.append(len(self.asked) - next(waiting))
            yield from super()._answer(question)

    answers, _ = ask(Slow(), questions, images)
    assert list(answers) == [1, 2, 3, 5]
    assert max(most) == 3


def test_the_page_and_the_rows(write, questions, images):
    answers = pope.read_answers(write("answers.json", ANSWERS), questions)
    report = judge(questions, answers, images_dir=images, faults=("x.png is <damaged>.",))
    page = report.as_page()
    assert page.count("<article") == page.count("data:image/jpeg") == 2
    # What is not there comes before what was overlooked.
    assert page.index("question 3") < page.index("question 5")
    assert "x.png is &lt;damaged&gt;." in page
    rows = report.as_rows().rows
    assert rows[2] == (3, "2.png", "Is there a dog in the image?", "no", "yes", 0, "yes")


def test_the_page_stands_without_its_pictures(write, questions, tmp_path):
    answers = pope.read_answers(write("answers.json", ANSWERS), questions)
    page = judge(questions, answers, images_dir=tmp_path).as_page()
    assert page.count("<article") == 2


CHATS = """\
{"chat_id": 0, "image": "1.png", "text": ["A dog?", "A cat?", "A car?"],\
 "label": ["yes", "no", "no"]}
{"chat_id": 1, "image": "none.png", "text": ["A bus?", "A hat?"], "label": ["yes", "no"]}
"""


class Counts:
    """Says how many turns or ends it was given, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def submit(self, messages, sampling):
        said = [part for message in messages for part in message.content]
        self.asked.append([part for part in said if isinstance(part, str)])
        return self._answer(f"Yes {len(messages)}")

    def submit_raw(self, text, pictures, sampling):
        self.asked.append(text)
        return self._answer(f"No {text.count('</s>')}")

    def _answer(self, text):
        yield TextDelta("", Reply(text, (1,), "stop", Usage(1, 1)))


def test_questions_in_one_dialogue(write, images, tmp_path):
    asked = pope.read_questions(write("chat.json", CHATS))
    assert [each.question_id for each in asked] == ["0#1", "0#2", "0#3", "1#1", "1#2"]
    settings = {
        "images_dir": images, "sampling": SamplingParams(max_new_tokens=5), "asked_of": "it",
    }  # fmt: skip
    ledger = Ledger(tmp_path / "l.jsonl", keys=asking.LEDGER_KEYS)
    first, second = Counts(), Counts()
    for model in (first, second):
        answers, faults = pope.ask_in_dialogues(
            model, asked, prompt="{question}", ledger=ledger, **settings
        )
        assert answers == {"0#1": "Yes 1", "0#2": "Yes 3", "0#3": "Yes 5"}
        assert faults == (f"The folder {images} lacks none.png.",)
    assert second.asked == []  # All was in the ledger.
    assert first.asked[2] == ["A dog?", "Yes 1", "A cat?", "Yes 3", "A car?"]
    raw = Counts()
    answers, _ = pope.ask_in_dialogues(
        raw, asked, prompt="H: <ImageHere> {question} A:", prompt_later="H:{question} A:",
        ledger=Ledger(None, keys=asking.LEDGER_KEYS), **settings,
    )  # fmt: skip
    assert raw.asked[2] == "H: <ImageHere> A dog? A:No 0</s>H:A cat? A:No 1</s>H:A car? A:"
    # PAI's own answers stand in the questions' order.
    lines = [json.dumps({"query": each.text, "ans": "Yes", "question": "H:"}) for each in asked]
    given = pope.read_answers(write("pai.jsonl", "\n".join(lines)), asked)
    assert given["1#2"] == "Yes"
