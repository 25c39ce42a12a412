"""Questions with given answers: their layouts, and the likeliest of them, as in the laboratory."""

import json
import random
from dataclasses import replace

import pytest

from minigpt4_runtime import ConfigError, MiniGPT4, image
from minigpt4_runtime.evaluation import choice, imagenetvc
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
    assert "<p>As theirs.</p>" in replace(report, as_published="As theirs.").as_page()
    some = judge(questions, {1: likelihoods[1]}, images_dir=images, faults=["One is missing."])
    assert (some.num_unanswered, some.left_out) == (2, ("One is missing.",))
    with pytest.raises(ConfigError, match=r"No question could be asked\. One is missing\."):
        judge(questions, {}, images_dir=images, faults=["One is missing."])


MAPPING = "n01443537 goldfish, Carassius auratus\nn02123045 tabby, tabby cat\n"
# As published: a column each, and others.csv with yes and no, numbers and words.
COLOUR = """category,question,answer
goldfish,What is the color of a goldfish?,orange
tabby,"What color is a tabby, mostly?",gray
goldfish,What color is its fin?,orange
"""
OTHERS = """category,question,answer
tabby,Does a tabby purr?,yes
tabby,How many legs has a tabby?,4
goldfish,Does it live in water?,no
goldfish,Is it long or short?,short
"""


@pytest.fixture
def imagenetvc_dir(tmp_path, images):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/color.csv").write_text(COLOUR)
    (tmp_path / "datasets/others.csv").write_text(OTHERS)
    (tmp_path / "mapping.txt").write_text(MAPPING)
    picture = (images / "1.png").read_bytes()
    for folder, count in {"n01443537": 12, "n02123045": 2}.items():
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / ".DS_Store").write_text("x")
        for number in range(count):
            (tmp_path / "images" / folder / f"{folder}_{number:02}.png").write_bytes(picture)
    return tmp_path


def test_imagenetvcs_layout(imagenetvc_dir):
    folder = imagenetvc_dir
    found = imagenetvc.read_questions(
        folder / "datasets", folder / "images", folder / "mapping.txt"
    )
    by_whole = {}
    for each in found:
        by_whole.setdefault(each.whole, []).append(each)
    assert list(by_whole) == [
        *(f"color/{n}" for n in (1, 2, 3)),
        *(f"others/{n}" for n in range(1, 5)),
    ]
    assert {each.question_id for each in found} == {
        f"{each.whole}#{number}" for part in by_whole.values()
        for number, each in enumerate(part, start=1)
    }  # fmt: skip
    # Ten of twelve, as the script draws them; both of two.
    random.seed(2022)
    drawn = random.sample([f"n01443537_{number:02}.png" for number in range(12)], 10)
    assert [each.image for each in by_whole["color/1"]] == [f"n01443537/{name}" for name in drawn]
    assert [each.image for each in by_whole["color/2"]] == [
        "n02123045/n02123045_00.png", "n02123045/n02123045_01.png",
    ]  # fmt: skip
    assert by_whole["color/2"][0].text == "What color is a tabby, mostly?"
    choices = {
        whole: (part[0].choices, part[0].right, part[0].kind) for whole, part in by_whole.items()
    }
    assert choices["color/2"] == (("orange", "gray"), 1, "color")
    assert choices["others/2"] == (("4",), 0, "others")
    assert choices["others/3"] == (("yes", "no"), 1, "others")
    # Without the mapping folders have the names of categories; a missing one is named when asked.
    (folder / "images/n02123045").rename(folder / "images/tabby")
    plain = imagenetvc.read_questions(folder / "datasets/color.csv", folder / "images")
    assert [each.image for each in plain] == [
        "goldfish", "tabby/n02123045_00.png", "tabby/n02123045_01.png", "goldfish",
    ]  # fmt: skip


def test_imagenetvc_of_another_layout(imagenetvc_dir, write):
    folder = imagenetvc_dir
    with pytest.raises(ConfigError, match=r"holds no \.csv"):
        imagenetvc.read_questions(folder / "images", folder / "images")
    path = folder / "color.csv"
    for text, message in {
        "question,answer\n?,red\n": "needs the columns category, question, answer",
        "category,question,answer\ntabby,?\n": "line 2: a category, question or answer is missing",
        "category,question,answer\npug,?,red\n": "has no class whose first name is pug",
        "category,question,answer\n": "holds no question",
        # One would swallow the next row, the other is longer than a field may be.
        'category,question,answer\ntabby,?,"red\ntabby,?,blue\n': r"no CSV \(.* in question 1\)",
        f"category,question,answer\ntabby,{'x' * 140000},red\n": r"no CSV \(field larger",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            imagenetvc.read_questions(path, folder / "images", folder / "mapping.txt")


def test_pictures_of_one_question_are_judged_together(images):
    """The mean of softmax(1 / loss), by hand; half of the pictures may be missing."""

    def asked(number, whole, *losses):
        question = ChoiceQuestion(
            f"{whole}#{number}", f"{number}.png", "?", ("a", "b"), 1, "", whole
        )
        return question, tuple(Likelihood(-loss, 1) for loss in losses)

    # 1 / loss is (2, 1), (1, 2), (0.5, 4): a wins the first, b the mean.
    pairs = [asked(1, "x", 0.5, 1), asked(2, "x", 1, 0.5), asked(3, "x", 2, 0.25),
             asked(1, "y", 0.0, 1), asked(2, "z", 0.5, 1)]  # fmt: skip
    questions = [question for question, _ in pairs]
    report = judge(
        questions, {q.question_id: found for q, found in pairs if q.whole != "z"}, images_dir=images
    )
    assert [(each.question.whole, each.chosen) for each in report.verdicts] == [("x", 1), ("y", 0)]
    assert report.verdicts[0].images == ("1.png", "2.png", "3.png")
    assert report.num_unanswered == 1
    assert [row[0] for row in report.as_rows().rows] == ["x", "y"]
    mapping = report.as_mapping()
    assert mapping["questions"] == 2
    assert [each["image"] for each in mapping["answers"][0]["pictures"]] == [
        "1.png",
        "2.png",
        "3.png",
    ]
    # On the first two, each picture chooses another: the sums are equal, and the first is taken.
    first = judge(
        questions[:2], {q.question_id: found for q, found in pairs[:2]}, images_dir=images
    )
    assert first.verdicts[0].chosen == 0
    page = first.as_page()
    assert "1.png · question x" in page
    assert "Beside several pictures" in page
    assert "Wrong answers (1 of 1)" in page
