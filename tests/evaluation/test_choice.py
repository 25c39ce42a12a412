"""Questions with given answers: their layouts, and the likeliest of them, as in the laboratory."""

import json
from dataclasses import replace

import pytest

from minigpt4_runtime import ConfigError, MiniGPT4, image
from minigpt4_runtime.evaluation import choice
from minigpt4_runtime.evaluation.choice import ChoiceQuestion, Likelihood, read_questions
from minigpt4_runtime.evaluation.choice_report import judge
from minigpt4_runtime.report.ledger import Ledger

SEED = {
    "question_type": {"Scene Understanding": 1, "Instance Counting": 5},
    "questions": [
        {"question_id": "11", "data_id": "1.png", "data_type": "image", "question_type_id": 5,
         "question": "How many shapes are there?", "choice_a": "There are no shapes.",
         "choice_b": "There is one shape.", "choice_c": "Six", "choice_d": "Ten", "answer": "B"},
        {"question_id": "12", "data_id": "v.mp4", "data_type": "video", "question_type_id": 10,
         "question": "?", "choice_a": "x", "choice_b": "y", "answer": "A"},
    ],
}  # fmt: skip
COUNTED = ChoiceQuestion(
    "11", "1.png", "How many shapes are there?",
    ("There are no shapes.", "There is one shape.", "Six", "Ten"), 1, "Instance Counting",
)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_file(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "q.json").write_text(text)
        return tmp_path / "q.json"

    return write_file


def test_published_and_plain_files(write):
    assert read_questions(write(SEED)) == (COUNTED,)
    record = {"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "kind": "pets"}
    plain = ChoiceQuestion(1, "a.png", "Which?", ("cat", "dog"), 1, "pets")
    for answer in ("b", "dog", 1):
        assert read_questions(write([{**record, "answer": answer}])) == (plain,)
    assert read_questions(write(json.dumps({**record, "answer": 1}) + "\n")) == (plain,)
    icons = {**record, "image_id": "77", "answer": 1}  # Each of IconQA's pictures has a folder.
    del icons["image"]
    assert read_questions(write([icons])) == (replace(plain, image="77/image.png"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "a.png", "question": "?", "choices": ["x"], "answer": 0}], "lacks an image"),
        ([{"question": "?", "choices": ["x", "y"], "answer": 0}], "lacks an image"),
        ([{"image": "a", "question": "?", "choices": ["x", "y"], "answer": "C"}], "'C' is none"),
        ([{"image": "a", "question": "?", "choices": ["x", "y"], "answer": 2}], "2 is none"),
        ([3], "is no object"),
        ([], "holds no question"),
    ],
)
def test_questions_of_another_layout(write, content, message):
    with pytest.raises(ConfigError, match=message):
        read_questions(write(content))


def test_a_model_is_asked_once(images, tmp_path, monkeypatch):
    model = MiniGPT4.load(device="cpu")
    questions = (COUNTED, ChoiceQuestion(2, "no.png", "?", ("a", "b"), 0))
    path = tmp_path / "choice.jsonl"
    how = {"images_dir": images, "prompt": "{question}", "asked_of": "demo"}
    found, faults = choice.ask(
        model, questions, ledger=Ledger(path, keys=choice.LEDGER_KEYS), **how
    )
    assert list(found) == ["11"]
    assert faults == (f"The folder {images} lacks no.png.",)
    lab = model.lab()
    asked = lab.prompt(
        [{"role": "user", "content": [image(images / "1.png"), "How many shapes are there?"]}]
    )
    for likelihood, text in zip(found["11"], COUNTED.choices, strict=True):
        ids = lab.ids_of(text)
        assert likelihood.num_ids == len(ids)
        loss = float(lab.forward(asked, answer=ids).loss)
        assert likelihood.logprob == pytest.approx(-loss * len(ids), abs=1e-2)
    raw = "###Human: <Img><ImageHere></Img> {question} ###Assistant:"
    other, _ = choice.ask(
        model, questions, ledger=Ledger(None, keys=choice.LEDGER_KEYS), **{**how, "prompt": raw}
    )
    asked = lab.prompt(raw.replace("{question}", COUNTED.text), [images / "1.png"])
    wanted = lab.score(asked, COUNTED.choices).tolist()
    assert [each.logprob for each in other["11"]] == pytest.approx(wanted, abs=1e-4)
    # What is in the ledger is not computed again.
    monkeypatch.setattr(MiniGPT4, "submit_score", None)
    again, _ = choice.ask(model, questions, ledger=Ledger(path, keys=choice.LEDGER_KEYS), **how)
    assert again == found


def test_the_numbers_by_hand(images):
    def asked(number, right, *likelihoods, kind="counting"):
        texts = tuple(f"answer {n}" for n in range(len(likelihoods)))
        question = ChoiceQuestion(number, "1.png", "?", texts, right, kind)
        return question, tuple(Likelihood(*each) for each in likelihoods)

    # The second answer of the first is likelier an id, and less likely as a whole.
    pairs = [
        asked(1, 1, (-4.0, 2), (-6.0, 6)),
        asked(2, 0, (-1.0, 1), (-3.0, 1), (-9.0, 1), (-9.0, 1)),
        asked(3, 1, (-1.0, 1), (-3.0, 1), kind="places"),
    ]
    likelihoods = {question.question_id: found for question, found in pairs}
    questions = [question for question, _ in pairs]
    report = judge(questions, likelihoods, images_dir=images)
    whole = report.as_mapping()
    assert whole["kinds"] == {
        "counting": {"accuracy": 1, "whole": 0.5, "chance": 0.375},
        "places": {"accuracy": 0, "whole": 0, "chance": 0.5},
        "all": {"accuracy": 2 / 3, "whole": 1 / 3, "chance": 1.25 / 3},
    }
    assert [row[-1] for row in report.as_rows().rows] == [1, 1, 0]
    assert "Wrong answers (1 of 1)" in report.as_page()
    some = judge(questions, {1: likelihoods[1]}, images_dir=images, faults=["One is missing."])
    assert (some.num_unanswered, some.left_out) == (2, ("One is missing.",))
    with pytest.raises(ConfigError, match=r"No question could be asked\. One is missing\."):
        judge(questions, {}, images_dir=images, faults=["One is missing."])
