"""`minigpt4 evaluate chair`, `choice` and `mme`: asking, and the files that they write."""

import json
from pathlib import Path

import fake_api
import pytest

NEEDS = (
    "--instances", "instances.json", "--captions", "people.json", "--synonyms", "synonyms.txt",
)  # fmt: skip


@pytest.fixture
def coco(folder):
    """Two pictures of COCO's, with their annotations and a list of objects."""
    for number, source in ((7, "a.png"), (16631, "b.jpg")):
        name = f"COCO_val2014_{number:012d}{source[1:]}"
        (folder / source).rename(folder / name)
    annotations = {
        "instances.json": {
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [{"image_id": number, "category_id": 1} for number in (7, 16631)],
        },
        "people.json": {"annotations": [{"image_id": 7, "caption": "A cat and a dog."}]},
    }
    for name, content in annotations.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "synonyms.txt").write_text("person, girl\ndog\ncat\n")
    return folder


def test_chair_asks_saves_and_scores_again(minigpt4, coco):
    asked = ("evaluate", "chair", *NEEDS, "--images", ".", "--drop-unfinished", "--prompt",
             "say A dog and a cat. And a girl")  # fmt: skip
    shown = minigpt4(*asked, "--model", "somewhere", "--save", "ours.jsonl", "--out", "report")
    assert (shown.status, shown.err) == (0, "The report is in report/chair.html.\n")
    # The cat of the second picture is not there; the girl was cut off.
    assert shown.out.splitlines()[1].split() == ["50.0%", "25.0%", "100.0%", "5.0", "2", "4"]
    saved = [json.loads(line) for line in (coco / "ours.jsonl").read_text().splitlines()]
    assert saved == [{"image_id": i, "caption": "A dog and a cat."} for i in (7, 16631)]
    again = minigpt4("evaluate", "chair", *NEEDS, "--results", "ours.jsonl")
    assert (again.status, again.out) == (0, shown.out)
    (coco / "one.jsonl").write_text('{"image_id": 7, "caption": ""}\n')
    some = minigpt4("evaluate", "chair", *NEEDS, "--results", "ours.jsonl", "--ids", "one.jsonl")
    assert some.out.splitlines()[1].split()[:1] == ["0.0%"]
    # What was asked is not asked again: no model is needed to go on.
    ledger = (coco / "report" / "chair.jsonl").read_text()
    assert minigpt4(*asked, "--model", "somewhere", "--out", "report").out == shown.out
    assert (coco / "report" / "chair.jsonl").read_text() == ledger


def test_opope_reads_captions(minigpt4, coco):
    question = {"question_id": 1, "image": "COCO_val2014_000000000007.png", "label": "yes"}
    (coco / "q.json").write_text(json.dumps({**question, "text": "Is there a dog in the image?"}))
    (coco / "ours.jsonl").write_text('{"image_id": 7, "caption": "A dog."}\n')
    shown = minigpt4("evaluate", "opope", "--questions", "q.json", "--results", "ours.jsonl",
                     "--synonyms", "synonyms.txt", "--images", ".", "--out", "report")  # fmt: skip
    assert (shown.status, shown.err) == (0, "The report is in report/opope.html.\n")
    assert shown.out.splitlines()[1].split()[:6] == ["100.0%"] * 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give captions with --results, or pictures to describe with --images."),
        (("--images", "sub"), "has no picture with a wanted number"),
        (("--results", "people.json"), "has no image_id and caption"),
    ],
)
def test_what_cannot_be_judged_is_said(minigpt4, coco, arguments, said):
    shown = minigpt4("evaluate", "chair", *NEEDS, *arguments, "--model", "somewhere")
    assert shown.status == 1
    assert said in shown.err


def test_choice_with_the_demo_model_itself(real_minigpt4, folder):
    picture = Path(__file__).parents[2] / "examples/images/three.png"
    (folder / "three.png").write_bytes(picture.read_bytes())
    record = {
        "image": "three.png", "question": "How many shapes are there?", "answer": "b",
        "choices": ["There are five shapes.", "There are three shapes."], "kind": "counting",
    }  # fmt: skip
    (folder / "q.json").write_text(json.dumps([record]))
    asked = ("evaluate", "choice", "--questions", "q.json", "--images", ".")
    shown = real_minigpt4(*asked, "--out", "report")
    assert shown.status == 0
    assert shown.out.splitlines()[-1].split() == ["all", "100.0%", "100.0%", "50.0%", "1"]
    refused = real_minigpt4(*asked, "--prompt", "?")
    assert (refused.status, "without {question}" in refused.err) == (1, True)
    refused = real_minigpt4(*asked, "--classes", "mapping.txt")
    assert (refused.status, "--classes is for ImageNetVC" in refused.err) == (1, True)
    # ImageNetVC's layout: two pictures of one question, which is one in the table.
    question = "How many shapes are there?"
    rows = f"tabby,{question},There are three shapes.\npug,{question},There are five shapes.\n"
    (folder / "count.csv").write_text(f"category,question,answer\n{rows}")
    (folder / "mapping.txt").write_text("n1 tabby, cat\nn2 pug, pug-dog\n")
    (folder / "n1").mkdir()
    for name in ("1.png", "2.png"):
        (folder / "n1" / name).write_bytes(picture.read_bytes())
    asked = ("evaluate", "choice", "--questions", "count.csv", "--images", ".")
    shown = real_minigpt4(*asked, "--classes", "mapping.txt", "--out", "vc")
    assert (shown.status, "lacks n2." in shown.err) == (1, True)
    assert shown.out.splitlines()[-1].split() == ["all", "100.0%", "100.0%", "50.0%", "1"]
    assert (folder / "vc/choice.html").is_file()


def test_mme_asks_and_scores_again(minigpt4, folder):
    lines = [
        "a.png\tsay Yes.\tYes",
        "a.png\tsay No.\tNo",
        "b.jpg\tsay No.\tYes",
        "b.jpg\tsay No.\tNo",
    ]
    for name, end in (("asked", ""), ("given", "\tNo")):
        (folder / name).mkdir()
        (folder / name / "count.txt").write_text("".join(f"{line}{end}\n" for line in lines))
    asked = ("evaluate", "mme", "--questions", "asked", "--images", ".")
    shown = minigpt4(*asked, "--model", "somewhere", "--out", "report")
    assert (shown.status, shown.err) == (0, "The report is in report/mme.html.\n")
    assert shown.out.splitlines()[1].split() == ["count", "75.0%", "50.0%", "125.0", "0", "2"]
    assert shown.out.splitlines()[-1].split() == ["perception", "125.0"]
    again = minigpt4(*asked, "--results", "given", "--recipe", "vlmevalkit", "--out", "again")
    assert again.out.splitlines()[1].split()[1:4] == ["50.0%", "0.0%", "50.0"]
    assert "published run: answers are drawn by lot" in (folder / "again/mme.html").read_text()


MINE = """
source = "a paper"
[captions]
prompt = { value = "say Assistant: A cat. And", source = "p. 1" }
max_new_tokens = { value = 9, source = "p. 1" }
cut = { value = ["after-assistant", "finished"], source = "p. 2" }
pictures = { value = 1, source = "p. 2" }
pictures_seed = { value = 1, source = "p. 2" }
pictures_drawn = { value = "sample", source = "p. 2" }
pictures_order = { value = "annotations", source = "p. 2" }
"""


def test_a_recipe_of_ones_own_asks_draws_and_cuts(minigpt4, coco):
    people = json.loads((coco / "people.json").read_text())
    (coco / "people.json").write_text(json.dumps({**people, "images": [{"id": 16631}, {"id": 7}]}))
    (coco / "mine.toml").write_text(MINE)
    asked = ("evaluate", "chair", *NEEDS, "--images", ".", "--recipe", "mine.toml")
    shown = minigpt4(*asked, "--save", "ours.jsonl", "--max-new-tokens", "8")
    assert shown.status == 0
    assert "As mine does it (a paper). This differs from the published run: " in shown.err
    assert "--max-new-tokens as given here." in shown.err
    # random.Random(1).sample takes the first of two.
    assert json.loads((coco / "ours.jsonl").read_text()) == {
        "image_id": 16631, "caption": "A cat.",
    }  # fmt: skip
    described = minigpt4("describe", ".", "--recipe", "mine.toml", "--out", "d.jsonl")
    assert "not in the order of COCO's file" in described.err
    record = json.loads((coco / "d.jsonl").read_text())
    assert record["answer"] == "A cat."
    refused = minigpt4("describe", ".", "--recipe", "mine.toml", "--task", "vqa")
    assert refused.status == 1
    assert "--recipe says how to ask, and --task too." in refused.err


def test_pope_by_a_published_recipe(minigpt4, folder):
    line = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (folder / "q.jsonl").write_text(json.dumps(line))
    pope = ("evaluate", "pope", "--questions", "q.jsonl", "--images", ".", "--out", "report")
    shown = minigpt4(*pope, "--recipe", "pai")
    assert shown.status == 0
    assert "As pai does it (https://github.com/LALBJ/PAI at " in shown.err
    assert "published run: no attention boost" in shown.err
    prompt, sampling = fake_api.FakeMiniGPT4.raw[-1]
    assert prompt == "###Human: <Img><ImageHere></Img> Is there a dog? ###Assistant:"
    assert sampling.max_new_tokens == 512
    report = json.loads((folder / "report" / "pope.json").read_text())
    assert report["reading"] == "all-words"
    # The page says it too, and what was typed in the recipe's stead.
    assert report["as_published"] in shown.err
    minigpt4(*pope, "--recipe", "pai", "--max-new-tokens", "9")
    page = (folder / "report" / "pope.html").read_text()
    assert "<p>As pai does it" in page
    assert "; --max-new-tokens as given here.</p>" in page
    # Other sampling is another answer: nothing is taken from the ledger.
    minigpt4(*pope, "--recipe", "vlmevalkit")
    asked_of = [
        json.loads(each)["asked_of"]
        for each in (folder / "report" / "pope.jsonl").read_text().splitlines()
    ]
    assert [", temperature 1.0" in each for each in asked_of] == [False, False, True]


def test_an_adapter_that_changed_is_asked_anew(minigpt4, folder):
    line = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (folder / "q.jsonl").write_text(json.dumps(line))
    pope = ("evaluate", "pope", "--questions", "q.jsonl", "--images", ".", "--out", "report")
    counts = []
    for content in ("learned", "learned", "learned more"):
        (folder / "mine.pth").write_text(content)
        assert minigpt4(*pope, "--adapter", "mine.pth").status == 0
        counts.append(len((folder / "report" / "pope.jsonl").read_text().splitlines()))
    assert counts == [1, 1, 2]


def test_pope_in_dialogues(minigpt4, folder):
    chat = {"chat_id": 4, "image": "a.png", "text": ["A dog?", "A cat?"], "label": ["yes", "no"]}
    (folder / "chat.json").write_text(json.dumps(chat))
    pope = ("evaluate", "pope", "--questions", "chat.json", "--images", ".", "--dialogue")
    assert minigpt4(*pope).out.splitlines()[1].split()[-3:] == ["2", "0", "2"]
    assert minigpt4(*pope, "--recipe", "pai").status == 0
    start = "###Human: <Img><ImageHere></Img> A dog? ###Assistant:"
    said, _ = fake_api.FakeMiniGPT4.raw[-1]
    assert said.startswith(start)
    assert said.endswith("</s>###Human:A cat? ###Assistant:")
    raw = minigpt4(*pope, "--prompt", "<ImageHere>{question}")
    assert "needs a recipe's prompt_later" in raw.err
    (folder / "q.jsonl").write_text(
        '{"question_id": 1, "image": "a.png", "text": "A dog?", "label": "no"}'
    )
    alone = minigpt4(*pope[:3], "q.jsonl", *pope[4:])
    assert "q.jsonl has no dialogues" in alone.err
    chat["label"] = ["yes"]
    (folder / "chat.json").write_text(json.dumps(chat))
    assert "Chat 4 has 2 texts and 1 labels." in minigpt4(*pope).err


def test_amber_saves_and_scores(minigpt4, folder):
    queries = [
        {"id": number, "image": "a.png", "query": f"say {text}"}
        for number, text in ((1, "A lake."), (1005, "No, none"))
    ]
    (folder / "q.json").write_text(json.dumps(queries))
    (folder / "a.json").write_text('[{"id": 1005, "type": "relation", "truth": "no"}]')
    asked = ("evaluate", "amber", "--questions", "q.json", "--images", ".")
    assert "Give --save to collect answers" in minigpt4(*asked).err
    assert minigpt4(*asked, "--save", "saved.json").out == ""
    saved = json.loads((folder / "saved.json").read_text())
    assert saved == [{"id": 1, "response": "A lake."}, {"id": 1005, "response": "No"}]
    shown = minigpt4(*asked, "--annotations", "a.json")
    assert shown.out.splitlines()[1].split() == ["all", *["100.0%"] * 4, "1", "0"]
    queries[0]["image"] = "none.png"
    (folder / "q.json").write_text(json.dumps(queries))
    missing = minigpt4(*asked, "--save", "saved.json")
    assert (missing.status, "lacks none.png" in missing.err) == (1, True)
