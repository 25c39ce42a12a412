"""CHAIR's reading of captions, by hand, its numbers, and those of OPOPE."""

import json

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation.chair import (
    Caption,
    ObjectWords,
    coco_id,
    finished_part,
    read_captions,
    read_objects,
)
from minigpt4_runtime.evaluation.chair_report import judge
from minigpt4_runtime.evaluation.opope import judge as judge_opope
from minigpt4_runtime.evaluation.pope import PopeQuestion

# In the published layout, and of its objects some.
SYNONYMS = """\
person, girl, boy, man, woman, adult, people, passenger, baby
bicycle, bike
train, locomotive
airplane, plane, jet
bus, minibus
traffic light, stop light
bird, duck
cat, kitten
dog, puppy
knife
tie, bow, bow tie
skis, ski
wine glass
chair, seat
toilet
hot dog
dining table, table
"""
# A caption, and what it names, each found by hand.
TABLE = {
    "A man rides a bike past two dogs.": ["person", "bicycle", "dog"],
    "Women and men, people, girls": ["person"] * 4,
    "Traffic lights and a stop light": ["traffic light", "traffic light"],
    "A baby bird, an adult cat and a baby": ["bird", "cat", "person"],
    "A passenger train and a passenger jet": ["train", "airplane"],
    "Passengers leave the buses": ["person", "bus"],
    "He wears a bow tie": ["tie"],
    "Glasses of wine": [],
    "Two wine glasses and knives": ["wine glass", "knife"],
    "The toilet seat is up": ["toilet"],
    "A seat beside a toilet": ["toilet"],
    "A seat": ["chair"],
    "Hot dogs on tables": ["hot dog", "dining table"],
    "The dog's kitten; the puppies.": ["dog", "cat", "dog"],
    "Skis, a ski": ["skis", "skis"],
    "A cattle dogma in a scatter plot": [],
    "": [],
}


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


@pytest.fixture
def words(write):
    return ObjectWords.read(write("synonyms.txt", SYNONYMS))


@pytest.fixture
def coco(write):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}, {"id": 3, "name": "cat"}]
    segments = [(7, 1), (7, 2), (8, 3), (9, 1)]
    said = [(7, "A man on a bike"), (8, "A cat"), (8, "Nothing else"), (11, "A bus")]
    return (
        write("instances.json", {
            "categories": categories,
            "annotations": [{"image_id": i, "category_id": c} for i, c in segments],
        }),
        write("captions.json", {"annotations": [{"image_id": i, "caption": c} for i, c in said]}),
    )  # fmt: skip


@pytest.mark.parametrize("caption", TABLE)
def test_what_a_caption_names(words, caption):
    assert [mention.object for mention in words.find(caption)] == TABLE[caption]


def test_the_numbers_by_hand(words, coco):
    captions = (
        Caption(7, "A man with a dog and a cat."),  # The cat is not there; the bike is missed.
        Caption(8, "A cat, a cat."),
        Caption(9, "A bus beside a train, two trains"),  # Three mentions; the dog is missed.
        Caption(10, "A dog"),
    )
    instances, people = coco
    objects = read_objects([instances], [people], words, {each.image_id for each in captions})
    assert objects == {
        7: frozenset({"dog", "person", "bicycle"}), 8: frozenset({"cat"}), 9: frozenset({"dog"}),
    }  # fmt: skip
    report = judge(captions, objects, words)
    assert report.rates == {
        "chair_s": 2 / 3, "chair_i": 4 / 8, "recall": 3 / 5, "words": (8 + 4 + 7) / 3,
        "captions": 3, "mentions": 8,
    }  # fmt: skip
    assert report.left_out == ("COCO's annotations lack 1 picture (10).",)
    assert "train" in report.as_text()
    page = report.as_page()
    assert "Not there: bus, train" in page
    assert len(report.as_rows().rows) == 3
    with pytest.raises(ConfigError, match="No caption is of a picture with annotations"):
        judge(captions[3:], objects, words)
    nothing = judge((Caption(8, "Look!"),), objects, words)
    assert nothing.rates["chair_i"] is None
    assert "No caption names" in nothing.as_page()


def test_layouts_of_captions(write):
    published = '{"image_id": 42, "caption": "A dog."}\n{"image_id": 7, "caption": "A cat."}\n'
    assert read_captions(write("a.jsonl", published)) == (
        Caption(42, "A dog."),
        Caption(7, "A cat."),
    )
    listed = [{"image_id": 42, "caption": "A dog."}]
    assert read_captions(write("a.json", listed)) == (Caption(42, "A dog."),)
    ours = [
        {"image": "val/COCO_val2014_000000016631.jpg", "answer": "A dog."},
        {"image": "COCO_val2014_000000000009.jpg", "answer": None, "error": "It is damaged."},
    ]
    (found,) = read_captions(write("b.jsonl", "\n".join(map(json.dumps, ours))))
    assert (found.image_id, found.text) == (16631, "A dog.")
    assert coco_id("holiday.jpg") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_id": 1}', "Line 1 of .* has no image_id and caption"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}', "two captions of"),
        ('{"image": "holiday.jpg", "answer": "a"}', "has no image_id"),
        ("[]", "holds no caption"),
    ],
)
def test_captions_of_another_layout(write, content, message):
    with pytest.raises(ConfigError, match=message):
        read_captions(write("a.jsonl", content))


def test_annotations_of_another_layout(write, words, coco):
    _, people = coco
    with pytest.raises(ConfigError, match="no lists of categories and annotations"):
        read_objects([people], [people], words, {7})
    other = write("o.json", {"categories": [{"id": 1, "name": "zebra"}], "annotations": []})
    with pytest.raises(ConfigError, match="names 'zebra', which the list of objects lacks"):
        read_objects([other], [people], words, {7})
    with pytest.raises(ConfigError, match="is no list of objects"):
        ObjectWords.read(write("s.txt", "a dog and a cat"))


def test_what_was_cut_off():
    assert finished_part("A dog. A cat. And the") == "A dog. A cat."
    assert finished_part("And the") == ""


def test_captions_answer_popes_questions(words):
    def ask(number, thing, label, image_id=7):
        name = f"COCO_val2014_{image_id:012d}.jpg"
        return PopeQuestion(number, name, f"Is there a {thing} in the image?", label)

    questions = [
        ask(1, "dog", "yes"), ask(2, "cat", "no"), ask(3, "traffic light", "yes"),
        ask(4, "dining table", "no"), ask(5, "bus", "yes"), ask(6, "bus", "no", image_id=8),
    ]  # fmt: skip
    captions = (Caption(7, "Two dogs, a stop light and a kitten."), Caption(9, "A dog."))
    report = judge_opope(questions, captions, words)
    # Right: dog, traffic light, no table. Wrong: the cat is named, the bus is not.
    assert report.rates == {
        "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5,
        "f0.2": pytest.approx(2 / 3),
    }  # fmt: skip
    assert report.left_out == ("No question is about 1 picture (9).",)
    assert "OPOPE lets captions answer" in report.as_page()
    more = judge_opope(questions[:4], (Caption(7, "A dog and a bus"),), words).rates
    assert (more["precision"], more["recall"]) == (1, 1 / 2)
    assert more["f0.2"] == pytest.approx(1.04 * 0.5 / (0.04 + 0.5))
    with pytest.raises(ConfigError, match="is not about an object of the list"):
        judge_opope([ask(1, "unicorn", "no")], captions, words)
    with pytest.raises(ConfigError, match="No question was answered"):
        judge_opope(questions[5:], captions, words)
