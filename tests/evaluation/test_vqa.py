"""VQA's files are read as published, and answers are compared by its documented rules."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation import asking, vqa
from minigpt4_runtime.evaluation.vqa import VqaQuestion
from minigpt4_runtime.evaluation.vqa_accuracy import exact_accuracy, normalise, vqa_accuracy
from minigpt4_runtime.evaluation.vqa_report import VqaVerdict, judge

TEN = ["dog"] * 7 + ["puppy"] * 3
# Made by hand in the layout of VQAv2's files.
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 10, "image_id": 1, "question": "What is it?"},
        {"question_id": 11, "image_id": 2, "question": "How many?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 11, "image_id": 2, "question_type": "how many", "answer_type": "number",
         "answers": [{"answer": "2", "answer_id": number} for number in range(10)]},
        {"question_id": 10, "image_id": 1, "question_type": "what is", "answer_type": "other",
         "answers": [{"answer": each, "answer_id": n} for n, each in enumerate(TEN)]},
    ]
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_file(content, name):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return write_file


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        # The rules at visualqa.org/evaluation, in their order, with the examples given there.
        ("A Red BUS", "red bus"),
        ("yes.", "yes"),
        ("2.5", "2.5"),
        ("two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("the man and an apple", "man and apple"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("x-ray", "x ray"),
        ("what?", "what"),
        ("", ""),
        # Words that are another word without their apostrophe stay.
        ("were", "were"),
        ("well", "well"),
        ("its", "its"),
        ("shed", "shed"),
    ],
)
def test_spelling_is_made_equal_as_documented(answer, compared):
    assert normalise(answer) == compared


words = st.sampled_from(["a", "the", "Two", "dont", "dog", "dog's", "2.5", "1,000", "x-ray", "é"])


@given(st.lists(words), st.lists(words))
def test_words_are_made_equal_one_by_one(some, others):
    some = [word for word in some if word != "1,000"]
    others = [word for word in others if word != "1,000"]
    apart = f"{normalise(' '.join(some))} {normalise(' '.join(others))}".split()
    assert normalise(" ".join(some + others)).split() == apart


@given(
    st.lists(st.sampled_from(["one", "1", "a dog", "dog", "Cat"]), min_size=2, max_size=10).filter(
        lambda people: len(set(people)) > 1  # Where all agree, spelling counts.
    ),
    st.sampled_from(["1", "dog", "cat", "bird"]),
)
def test_the_accuracy_is_the_mean_over_all_but_one(people, answer):
    shares = [
        min(1, sum(normalise(each) == answer for each in others) / 3)
        for others in itertools.combinations(people, len(people) - 1)
    ]
    assert vqa_accuracy(answer, people) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    ("count", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)]
)
def test_the_known_values_for_ten_people(count, accuracy):
    people = ["dog"] * count + ["cat"] * (10 - count)
    assert vqa_accuracy("Dog", people) == pytest.approx(accuracy)


def test_spelling_counts_where_all_agree():
    assert vqa_accuracy("the dog", ["dog"] * 10) == 0
    assert vqa_accuracy("the dog", [*["dog"] * 9, "cat"]) == 1


def test_one_right_answer_must_be_given_in_any_case():
    assert exact_accuracy("Dog", "dog") == 1
    assert exact_accuracy("a dog", "dog") == 0
    question = VqaQuestion(1, "1.png", "?", ("dog",))
    assert VqaVerdict(question, " Dog<unk>\n").accuracy == 1
    assert VqaVerdict(VqaQuestion(1, "1.png", "?", ("yes",) * 10), "Yes").accuracy == 1


def test_vqav2_and_ok_vqa(write, images):
    (images / "COCO_val2014_000000000001.jpg").write_bytes((images / "1.png").read_bytes())
    (images / "000000000002.jpg").write_bytes((images / "2.png").read_bytes())
    questions = vqa.read_questions(
        write(QUESTIONS, "q.json"), write(ANNOTATIONS, "a.json"), images_dir=images
    )
    assert questions == (
        VqaQuestion(10, "COCO_val2014_000000000001.jpg", "What is it?", tuple(TEN)),
        VqaQuestion(11, "000000000002.jpg", "How many?", ("2",) * 10),
    )
    results = write([{"question_id": 10, "answer": "A puppy"}, {"question_id": 11, "answer": "2"}],
                    "results.json")  # fmt: skip
    report = judge(questions, asking.read_answers(results, questions), images_dir=images)
    assert report.rates == {
        "accuracy": pytest.approx((0.9 + 1) / 2), "questions": 2, "unanswered": 0, "all_wrong": 0,
    }  # fmt: skip
    page = report.as_page()
    assert page.count("<article") == page.count("data:image/jpeg") == 1
    assert "dog (7), puppy (3)" in page
    assert report.as_rows().rows[0][3:] == ("dog (7), puppy (3)", pytest.approx(0.9), "A puppy")
    assert json.loads(json.dumps(report.as_mapping()))["answers"][1]["accuracy"] == 1


def test_gqa(write, images):
    path = write(
        {"201": {"imageId": "n7", "question": "Is it red?", "answer": "no", "types": {}}}, "g.json"
    )
    questions = vqa.read_questions(path, None, images_dir=images)
    assert questions == (VqaQuestion("201", "n7.jpg", "Is it red?", ("no",)),)
    given_answers = write([{"questionId": "201", "prediction": "No"}], "p.json")
    answers = asking.read_answers(given_answers, questions)
    assert judge(questions, answers, images_dir=images).rates["accuracy"] == 1


def test_a_list_with_answers(write, images):
    records = [
        {"image": "1.png", "question": "What?", "answers": [{"answer": "dog"}, {"answer": "cat"}]},
        {"image": "2.png", "question": "What?", "answer": "dog"},
    ]
    questions = vqa.read_questions(write(records, "list.json"), None, images_dir=images)
    assert [(each.question_id, each.right) for each in questions] == [
        (1, ("dog", "cat")), (2, ("dog",)),
    ]  # fmt: skip


def test_statements_that_are_right_or_wrong(write, images):
    """A line each: Visual Spatial Reasoning's, Hateful Memes', and one of our own."""
    records = [
        {"image": "1.png", "caption": "The dog is on the bed.", "label": 1, "relation": "on"},
        {"image": "2.png", "caption": "The cat is in the box.", "label": 0},
        {"id": 42, "img": "img/1.png", "label": 1, "text": "its their character"},
        {"id": 43, "img": "img/2.png", "label": 0, "text": "good morning"},
        {"image": "1.png", "question": "What?", "answer": "dog"},
    ]
    path = write("\n".join(map(json.dumps, records)) + "\n", "test.jsonl")
    questions = vqa.read_questions(path, None, images_dir=images)
    assert [(each.image, each.text, each.right) for each in questions] == [
        ("1.png", "The dog is on the bed.", ("true",)),
        ("2.png", "The cat is in the box.", ("false",)),
        ("img/1.png", "its their character", ("yes",)),
        ("img/2.png", "good morning", ("no",)),
        ("1.png", "What?", ("dog",)),
    ]
    unlabelled = write(json.dumps(records[0] | {"label": 2}), "bad.jsonl")
    with pytest.raises(ConfigError, match=r"Question 1 of .* has no 'question' as text"):
        vqa.read_questions(unlabelled, None, images_dir=images)


Q = QUESTIONS["questions"]


@pytest.mark.parametrize(
    ("content", "annotations", "message"),
    [
        ("?", None, "is no JSON object or list"),
        ([], None, "holds no question"),
        ([3], None, "Question 1 of .* is no object"),
        ({"1": 3}, None, "Question 1 of .* is no object"),
        ([{"question": "?", "answer": "x"}], None, "names no image"),
        ([{"image": "a", "question": "?"}], None, "has no answers as text"),
        ([{"image": "a", "question": "?", "answers": []}], None, "has no answers as text"),
        ([{"image": "a", "answer": "x"}], None, "has no 'question' as text"),
        ([{"question_id": 1.5, "image": "a", "question": "?", "answer": "x"}], None,
         "question_id must be a whole number or text"),
        ([{"question_id": 1, "image": "a", "question": "?", "answer": "x"}] * 2, None,
         "question 1 comes twice"),
        (QUESTIONS, None, "Give their file with --annotations"),
        (QUESTIONS, {}, "has no 'annotations'"),
        (QUESTIONS, {"annotations": []}, "has no answers to question 10"),
        ([{"image": "a", "question": "?", "answer": "x"}], ANNOTATIONS, "leave --annotations out"),
    ],
)  # fmt: skip
def test_files_of_another_layout(write, images, content, annotations, message):
    path = write(content, "q.json")
    answers = None if annotations is None else write(annotations, "a.json")
    with pytest.raises(ConfigError, match=message):
        vqa.read_questions(path, answers, images_dir=images)


def test_nothing_answered_is_an_error(images):
    with pytest.raises(ConfigError, match=r"No question was answered\. x\.png is damaged\."):
        judge([VqaQuestion(1, "1.png", "?", ("x",))], {}, images_dir=images,
              faults=("x.png is damaged.",))  # fmt: skip
