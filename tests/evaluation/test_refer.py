"""RefCOCO's phrases are read as published, and boxes are compared as by the published script."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime import ConfigError, SamplingParams
from minigpt4_runtime.evaluation import asking, refer
from minigpt4_runtime.evaluation.refer import ReferQuestion, overlap, read_box
from minigpt4_runtime.evaluation.refer_report import judge
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import Reply, TextDelta, Usage, read_messages
from minigpt4_runtime.report.ledger import Ledger

# Made by hand in the layout of refcoco_testA.json.
PHRASES = [
    {"img_id": "1", "sents": "the left half", "bbox": [0, 0, 50, 80], "height": 80, "width": 100},
    {"img_id": "2", "sents": ["right", "to the right"], "bbox": [50, 0, 50, 80], "height": 80,
     "width": 100},
    {"img_id": "COCO_train2014_000000000003_7", "sents": "all", "bbox": [0, 0, 100, 80],
     "height": 80, "width": 100},
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="refcoco_testA.json"):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


@pytest.fixture
def questions(write):
    return refer.read_questions(write(PHRASES))


def test_published_phrases(questions, write):
    assert questions[0] == ReferQuestion("1", "1.jpg", "the left half", (100, 80), (0, 0, 50, 80))
    assert [each.question_id for each in questions] == [
        "1", "2#1", "2#2", "COCO_train2014_000000000003_7",
    ]  # fmt: skip
    assert questions[3].image == "COCO_train2014_000000000003.jpg"
    lines = "\n".join(map(json.dumps, PHRASES))
    assert refer.read_questions(write(lines, "lines.jsonl")) == questions
    named = refer.read_questions(write([{**PHRASES[0], "image": "a/1.png"}], "named.json"))
    assert named[0].image == "a/1.png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("?", "Line 1 of .* is no phrase"),
        ([], "holds no phrase"),
        ([[1]], "Phrase 1 of .* is no object"),
        ([{**PHRASES[0], "bbox": [1, 2, 3]}], "Phrase 1 of .*: bbox must be four numbers"),
        ([{**PHRASES[0], "bbox": None}], "Phrase 1 of .*: bbox must be four numbers"),
        ([{**PHRASES[0], "width": "wide"}], "width and height be numbers"),
        ([{**PHRASES[0], "width": 0}], "width and height must be above 0"),
        ([{**PHRASES[0], "sents": 3}], "sents must be a phrase or a list"),
        ([PHRASES[0], {"img_id": 3}], "Phrase 2 of .* has no 'sents'"),
    ],
)
def test_phrases_of_another_layout(write, content, message):
    with pytest.raises(ConfigError, match=message):
        refer.read_questions(write(content))


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("{<10><20><30><40>}", (20, 10, 60, 20)),
        (" { <10> <20> <30> <40> } is where", (20, 10, 60, 20)),
        ("<unk>{<0><0><100><100>}", (0, 0, 200, 50)),
        ("{<0><0><150><100>}", (0, 0, 300, 50)),
        ("<p>the left half</p> {<10><20><30><40>}", None),
        ("It is at {<10><20><30><40>}", None),
        ("{<10><20><30>}", None),
        ("", None),
    ],
)
def test_an_answer_is_read_as_the_published_script_reads_it(answer, box):
    assert read_box(answer, (200, 50)) == (None if box is None else pytest.approx(box))


corners = st.tuples(*[st.integers(0, 12)] * 4)


def pixels_of(box):
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right + 1) for y in range(top, bottom + 1)}


@given(corners, corners)
def test_the_overlap_is_that_of_sets_of_pixels(one, other):
    one, other = (
        (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in (one, other)
    )
    a, b = pixels_of(one), pixels_of(other)
    assert overlap(one, other) == pytest.approx(len(a & b) / len(a | b))


def test_corners_in_the_wrong_order_find_nothing():
    assert overlap((50, 50, 20, 20), (20, 20, 50, 50)) == 0
    assert overlap((20, 20, 19, 19), (20, 20, 19, 19)) == 0  # Nothing is divided by nothing.


def test_more_than_half_counts_as_found(questions, images):
    answers = {
        "1": "{<0><0><50><100>}",  # As it is.
        "2#1": "{<0><0><100><100>}",  # 51·81 of 101·81 pixels.
        "2#2": "{<0><0><49><100>}",
        "COCO_train2014_000000000003_7": "everywhere",
    }
    report = judge(questions, answers, images_dir=images)
    first, second, third, last = report.verdicts
    assert (first.overlap, last.overlap, third.overlap) == (1, 0, 0)
    assert second.overlap == pytest.approx(51 / 101)
    assert report.rates == {
        "accuracy": 0.5, "mean_iou": pytest.approx((1 + 51 / 101) / 4), "questions": 4,
        "unanswered": 0, "without_box": 1,
    }  # fmt: skip
    half = ReferQuestion("x", "1.png", "half", (100, 80), (0, 0, 99, 79))
    exactly = judge([half], {"x": "{<0><0><49><100>}"}, images_dir=images).verdicts[0]
    assert exactly.overlap <= 0.5
    assert not exactly.is_right


class Model:
    """Points at the left half."""

    def __init__(self):
        self.asked = []

    def submit(self, messages, sampling):
        (message,) = read_messages(messages)
        picture, question = message.content
        open_rgb(picture)
        self.asked.append(question)
        return iter([TextDelta("", Reply("{<0><0><50><100>}", (1,), "stop", Usage(1, 1)))])


def test_a_model_is_asked_once(write, images, tmp_path):
    phrases = [{**PHRASES[0], "image": "1.png"}, {**PHRASES[1], "image": "2.png"}]
    questions = refer.read_questions(write(phrases))
    ledger = Ledger(tmp_path / "refer.jsonl", keys=asking.LEDGER_KEYS)
    settings = {
        "images_dir": images, "prompt": "[refer] give me the location of {question}",
        "sampling": SamplingParams(max_new_tokens=40), "asked_of": "v2",
        "right": lambda question: {"right": question.right},
    }  # fmt: skip
    model, again = Model(), Model()
    answers, faults = asking.ask(model, questions, ledger=ledger, **settings)
    assert (len(answers), faults) == (3, ())
    assert model.asked[0] == "[refer] give me the location of the left half"
    ledger = Ledger(tmp_path / "refer.jsonl", keys=asking.LEDGER_KEYS)
    assert asking.ask(again, questions, ledger=ledger, **settings) == (answers, ())
    assert again.asked == []
    # The ledger is a file of answers itself, and so is what the published script saves.
    assert asking.read_answers(tmp_path / "refer.jsonl", questions) == answers
    saved = write({name: [answer] for name, answer in answers.items()}, "saved.json")
    assert asking.read_answers(saved, questions) == answers
    assert judge(questions, answers, images_dir=images).rates["accuracy"] == pytest.approx(1 / 3)


def test_the_page_shows_both_boxes(write, images):
    questions = refer.read_questions(write([{**PHRASES[0], "image": "1.png"}, PHRASES[2]]))
    answers = {"1": "{<60><0><99><99>}", PHRASES[2]["img_id"]: "nowhere <there>"}
    report = judge(questions, answers, images_dir=images, faults=("x.png is <damaged>.",))
    page = report.as_page()
    assert page.count("<article") == 2
    assert page.count("data:image/jpeg") == 1  # The other picture is not there.
    assert "nowhere &lt;there&gt;" in page
    assert "x.png is &lt;damaged&gt;." in page
    rows = report.as_rows().rows
    assert rows[0] == ("1", "1.png", "the left half", 0.0, 0, "{<60><0><99><99>}")
    assert json.loads(json.dumps(report.as_mapping()))["answers"][1]["box"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"answer": "x"}], "Answer 1 of .* has no question_id"),
        ([{"question_id": "1"}], "Answer 1 of .* has no answer as text"),
        ({"1": ["a", "b"]}, "Question 1 of .* has no answer as text"),
        ([{"question_id": "1", "answer": "x"}] * 2, "answers question 1 twice"),
        ([{"question_id": "9", "answer": "x"}], "answers none of the questions"),
        ("?", "Line 1 of .* is no answer"),
    ],
)
def test_answers_of_another_layout(write, questions, content, message):
    with pytest.raises(ConfigError, match=message):
        asking.read_answers(write(content, "answers.json"), questions)
