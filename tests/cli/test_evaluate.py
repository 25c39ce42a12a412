"""`minigpt4 evaluate`: from files to a report, and what is said when something does not fit."""

import csv
import importlib
import json
import random
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from minigpt4_runtime.evaluation import judge as judge_room
from minigpt4_runtime.evaluation import scenes

ROOT = Path(__file__).parents[2]
PICTURES, DEMO_DIR = ROOT / "examples/images", ROOT / "src/minigpt4_runtime/assets/demo"


class StandInJudge:
    """Likes pictures and texts by their first letters: quick, and without a model."""

    digest, max_tokens = "stand-in", 8

    @classmethod
    def load(cls, path, *, device):
        assert device in {"auto", "cpu"}
        return cls()

    def embed_images(self, pictures):
        import torch

        return torch.tensor(
            [[1.0, 0.0] if picture.width > 9 else [0.0, 1.0] for picture in pictures]
        )

    def embed_texts(self, texts):
        import torch

        return torch.tensor([[0.6, 0.8] if text.startswith("A") else [0.8, 0.6] for text in texts])

    def count_tokens(self, texts):
        return [len(text.split()) for text in texts]


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(judge_room, "Judge", StandInJudge)


@pytest.fixture
def results(folder):
    """a.png and c.png answered twice; a wide picture is liked with a B, a narrow one with an A."""
    Image.new("RGB", (20, 8), "blue").save(folder / "b.jpg")
    (folder / "old.json").write_text(json.dumps({"x/a.png": "B one", "x/b.jpg": "A two"}))
    (folder / "new.json").write_text(json.dumps({"a.png": "A one", "b.jpg": "A two", "c.png": "B"}))
    return folder


CLIP = ("evaluate", "clip", "--images", ".", "--judge", "clip")
BOTH = ("--results", "old.json", "new.json")


def test_clip_compares_files_named_after_one_option(minigpt4, judge, results):
    shown = minigpt4(*CLIP, *BOTH, "--out", "report")
    assert shown.status == 1  # c.png is not in the folder itself.
    assert shown.err.splitlines() == [
        "Loading the judge from clip …",
        "error: The folder . lacks 1 picture (c.png).",
        "The report is in report/clip.html.",
    ]
    lines = shown.out.splitlines()
    assert lines[0].split() == ["run", "mean", "pictures", "over", "8", "tokens"]
    assert lines[1].split() == ["old", "0.6000", "2", "0"]
    assert lines[2].split() == ["new", "0.7000", "2", "0"]
    assert lines[5].split()[:4] == ["new", "1", "1", "0"]
    report = json.loads((results / "report" / "clip.json").read_text())
    assert report["comparisons"]["new"]["mean_difference"] == pytest.approx(0.1)
    with (results / "report" / "clip.csv").open() as file:
        assert [row["score"] for row in csv.DictReader(file)] == ["0.6", "0.8", "0.6", "0.6"]
    assert (results / "report" / "clip.html").read_text().startswith("<!doctype html>")


def test_clip_goes_on_where_it_was(minigpt4, judge, results, monkeypatch):
    first = minigpt4(*CLIP, *BOTH, "--out", "report")
    before = (results / "report" / "clip.jsonl").read_bytes()
    monkeypatch.setattr(StandInJudge, "embed_images", None)
    again = minigpt4(*CLIP, *BOTH, "--out", "report")
    assert again == first
    assert (results / "report" / "clip.jsonl").read_bytes() == before


def test_ctrl_c_keeps_what_was_scored_and_says_where(minigpt4, judge, results, monkeypatch):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StandInJudge, "count_tokens", interrupt)
        shown = minigpt4(*CLIP, *BOTH, "--out", "report")
        assert (shown.status, shown.out) == (130, "")
        assert "What was judged" not in shown.err
    minigpt4(*CLIP, "--results", "old.json", "--out", "report")
    with monkeypatch.context() as patch:
        patch.setattr(StandInJudge, "count_tokens", interrupt)
        shown = minigpt4(*CLIP, *BOTH, "--out", "report")
    assert (shown.status, shown.out) == (130, "")
    assert shown.err.splitlines()[1] == (
        "What was judged is in report/clip.jsonl; the same command goes on from there."
    )


def test_clip_takes_a_sample(minigpt4, judge, folder):
    answers = {}
    for number in range(30):
        Image.new("RGB", (8 + number, 8)).save(folder / f"{number}.png")
        answers[f"{number}.png"] = "A"
    (folder / "run.json").write_text(json.dumps(answers))

    def drawn(*arguments):
        shown = minigpt4(*CLIP, "--results", "run.json", "--out", "report", *arguments)
        assert shown.status == 0
        return list(json.loads((folder / "report" / "clip.json").read_text())["pictures"]), shown

    sample, _ = drawn("--sample", "5", "--seed", "3")
    assert len(sample) == 5
    assert drawn("--sample", "5", "--seed", "3")[0] == sample
    assert drawn("--sample", "5")[0] != sample
    everything, shown = drawn("--sample", "99")
    assert len(everything) == 30
    assert "--sample is 99, and there are 30 pictures: all are taken.\n" in shown.err


def test_clip_without_out_writes_nothing(minigpt4, judge, results):
    before = set(results.rglob("*"))
    shown = minigpt4(*CLIP, "--results", "old.json")
    assert shown.status == 0
    assert set(results.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CLIP, "--results", "no.json"), "no.json cannot be read (No such file or directory)"),
        ((*CLIP, "--results", "notes.txt"), "Line 1 of notes.txt is no answer to a picture."),
        ((*CLIP, "--results", "old.json", "--out", "notes.txt"), "--out is notes.txt, which is no"),
        ((*CLIP, "--results", "old.json"), "There is no judge at clip."),
        ((*CLIP, "--results", "old.json", "old.json"), "old.json is named twice."),
        (("evaluate", "parity", "--reference", "old.json", "--candidate", "two.json"),
         "The two files hold 3 runs (old, GPU, NPU). Give one in each."),
        (("evaluate", "parity", "--reference", "old.json", "--candidate", "new.json", "--images",
          "no"), "--images is no, and there is no such folder."),
        (("evaluate", "pope", "--questions", "old.json", "--images", "."), "has no 'question_id'"),
        (("evaluate", "pope", "--questions", "q.jsonl", "--images", "no"), "no such folder"),
        (("evaluate", "pope", "--questions", "q.jsonl", "--images", ".", "--prompt", "?"),
         "--prompt is '?', without {question}."),
        (("evaluate", "refer", "--questions", "old.json", "--images", "."), "has no 'img_id'"),
        (("evaluate", "vqa", "--questions", "old.json", "--images", "."), "is no object"),
        (("evaluate", "vqa", "--questions", "q.jsonl", "--images", ".", "--prompt", "?"),
         "--prompt is '?', without {question}"),
        (("evaluate", "demo", "--compare", "old.json"), "old.json is no demo.json."),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(minigpt4, results, arguments, message):
    (results / "two.json").write_text(json.dumps({"a.png": {"GPU": "x", "NPU": "y"}}))
    shown = minigpt4(*arguments)
    assert (shown.status, shown.out) == (1, "")
    *_, error = shown.err.splitlines()
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("package", "room", "arguments"),
    [
        ("matplotlib", "report.chart", ("evaluate", "demo", "--scenes", "1", "--out", "report")),
        ("transformers", "evaluation.judge", (*CLIP, "--results", "old.json")),
        ("rapidfuzz", "evaluation.parity",
         ("evaluate", "parity", "--reference", "old.json", "--candidate", "new.json")),
    ],
)  # fmt: skip
def test_a_package_that_is_not_there_is_named(
    minigpt4, results, monkeypatch, package, room, arguments
):
    parent, _, name = f"minigpt4_runtime.{room}".rpartition(".")
    monkeypatch.delitem(sys.modules, f"{parent}.{name}", raising=False)
    monkeypatch.delattr(importlib.import_module(parent), name, raising=False)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    shown = minigpt4(*arguments)
    assert (shown.status, shown.out) == (1, "")
    assert f"error: {package}" in shown.err
    assert "Run: pip install 'minigpt4-runtime[eval]'" in shown.err


@pytest.mark.parametrize("arguments", [(), ("clip",), ("clip", "--sample", "0"), ("paint",)])
def test_wrong_usage(minigpt4, arguments):
    shown = minigpt4("evaluate", *arguments)
    assert (shown.status, shown.out) == (2, "")
    assert "Usage: minigpt4 evaluate" in shown.err


def test_what_describe_wrote_is_compared(minigpt4, folder):
    """The files of two runs of `describe`, one of which says something else."""
    minigpt4("describe", "a.png", "b.jpg", "--prompt", "say A dog.", "--out", "one.jsonl")
    minigpt4("describe", "a.png", "--prompt", "say A dog.", "--out", "two.jsonl")
    minigpt4("describe", "b.jpg", "--prompt", "say A cat.", "--out", "two.jsonl", "--resume")
    shown = minigpt4(
        "evaluate", "parity", "--reference", "one.jsonl", "--candidate", "two.jsonl",
        "--images", ".", "--out", "report",
    )  # fmt: skip
    assert (shown.status, shown.err) == (0, "The report is in report/parity.html.\n")
    heading, columns, row, *_, one, other = shown.out.splitlines()
    assert (one, other) == ("- dog.", "+ cat.")
    assert heading == "two against one"
    # The stand-in for the model gives every answer the one id 1.
    assert "tokens until they part" in columns
    assert row.split()[:5] == ["2", "1", "50.0%", "100.0%", "0.7500"]
    page = (folder / "report" / "parity.html").read_text()
    assert "A <ins>cat</ins>." in page
    assert page.count("data:image/jpeg") == 1


def test_parity_with_a_judge(minigpt4, judge, results):
    shown = minigpt4(
        "evaluate", "parity", "--reference", "old.json", "--candidate", "new.json",
        "--judge", "clip", "--device", "cpu",
    )  # fmt: skip
    assert shown.status == 1
    assert "error: old has no answer to 1 picture (c.png).\n" in shown.err
    assert shown.out.splitlines()[2].split()[5] == "0.9800"  # Half of 0.96 and 1.


@pytest.mark.parametrize("change", [("dtype", "bfloat16"), ("cache-dtype", "int4")])
def test_parity_with_two_models_and_the_pictures(real_minigpt4, tmp_path, change):
    option, value = change
    ask = ("describe", PICTURES / "two.png", "--device", "cpu", "--prompt", "How many?")
    real_minigpt4(*ask, "--out", tmp_path / "one.jsonl")
    real_minigpt4(*ask, f"--{option}", value, "--out", tmp_path / "two.jsonl")
    judge = (
        "evaluate", "parity", "--reference", tmp_path / "one.jsonl", "--device", "cpu",
        "--candidate", tmp_path / "two.jsonl", "--reference-model", DEMO_DIR,
    )  # fmt: skip
    shown = real_minigpt4(*judge, "--images", PICTURES)
    assert shown.status == 1
    assert "KL needs --reference-model, --candidate-model and --images." in shown.err
    judge += ("--candidate-model", DEMO_DIR, "--images", PICTURES)
    shown = real_minigpt4(*judge)
    assert shown.status == 1
    assert "error: No KL for 1 picture" in shown.err
    assert "Give the prompt of the answers." in shown.err
    judge += ("--prompt", "How many?", f"--candidate-{option}", value, "--out", tmp_path / "out")
    shown = real_minigpt4(*judge)
    assert shown.status == 0
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert 0 < report["mean_kl"] == report["pairs"][0]["kl"] < 0.05


@pytest.fixture
def questions(folder):
    lines = [
        {"question_id": 1, "image": "a.png", "text": "say Yes.", "label": "yes"},
        {"question_id": 2, "image": "a.png", "text": "say No.", "label": "yes"},
        {"question_id": 3, "image": "b.jpg", "text": "say Yes.", "label": "no"},
    ]
    path = folder / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


POPE = ("evaluate", "pope", "--questions", "coco_pope_random.json", "--images", ".")


def test_pope_asks_the_model(minigpt4, questions, folder):
    shown = minigpt4(*POPE, "--out", "report", "--model", "somewhere", "--dtype", "float16")
    assert (shown.status, shown.err) == (0, "The report is in report/pope.html.\n")
    assert shown.out.splitlines()[1].split() == [
        "33.3%", "50.0%", "50.0%", "50.0%", "66.7%", "3", "0", "0",
    ]  # fmt: skip
    record = json.loads((folder / "report" / "pope.jsonl").read_text().splitlines()[0])
    assert record["asked_of"].startswith("model somewhere, device cpu, dtype float16, ")
    # The answers can be scored again without a model.
    again = minigpt4(*POPE, "--results", "report/pope.jsonl")
    assert (again.status, again.out) == (0, shown.out)


def test_pope_names_answers_and_questions_without_each_other(minigpt4, questions, folder):
    lines = [{"question_id": number, "answer": "Yes"} for number in (1, 99)]
    (folder / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = minigpt4(*POPE, "--results", "given.jsonl")
    assert shown.status == 1
    assert shown.err == (
        "error: given.jsonl has no answer to 2 questions (2, 3).\n"
        "error: given.jsonl has 1 answer (99) to no question.\n"
    )
    assert shown.out.splitlines()[1].split()[-3:] == ["1", "2", "0"]


def test_pope_names_what_it_cannot_ask(minigpt4, questions, folder):
    (folder / "a.png").unlink()
    shown = minigpt4(*POPE, "--model", "somewhere")
    assert shown.status == 1
    assert shown.err == "error: The folder . lacks a.png.\n"
    assert shown.out.splitlines()[1].split()[-3:] == ["1", "2", "0"]


def test_pope_with_the_demo_model_itself(real_minigpt4, folder):
    draws = random.Random(0)
    scene = scenes.random_scene(draws, held_out=True)
    scenes.draw(scene, draws).save(folder / "scene.png")
    kinds = {shape.kind for shape in scene.shapes}
    lines = [
        {"question_id": number, "image": "scene.png", "text": f"Is there a {kind}?",
         "label": "yes" if kind in kinds else "no"}
        for number, kind in enumerate(scenes.KINDS)
    ]  # fmt: skip
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    shown = real_minigpt4(*POPE)
    assert shown.status == 0
    assert shown.out.splitlines()[1].split()[0] == "100.0%"


def test_refer_asks_where_things_are(minigpt4, folder):
    phrase = {"img_id": 1, "image": "a.png", "bbox": [0, 0, 50, 50], "width": 100, "height": 100}
    phrases = [
        {**phrase, "sents": ["say {<0><0><50><50>}"]},
        {**phrase, "img_id": 2, "sents": "say nowhere"},
        {**phrase, "img_id": 3, "image": "no.png", "sents": "it"},
    ]
    (folder / "refcoco_testA.json").write_text(json.dumps(phrases))
    asked = ("evaluate", "refer", "--questions", "refcoco_testA.json", "--images", ".")
    shown = minigpt4(*asked, "--prompt", "{question}", "--out", "report", "--model", "somewhere")
    assert shown.status == 1
    assert shown.err == ("error: The folder . lacks no.png.\nThe report is in report/refer.html.\n")
    assert shown.out.splitlines()[1].split() == ["50.0%", "0.500", "2", "1", "1"]
    again = minigpt4(*asked, "--results", "report/refer.jsonl")
    assert (again.status, again.out) == (1, shown.out)
    assert again.err == "error: report/refer.jsonl has no answer to 1 question (3).\n"


def test_refer_asks_as_the_model_was_taught(minigpt4, folder):
    phrase = {"img_id": 1, "image": "a.png", "bbox": [0, 0, 50, 50], "width": 100, "height": 100}
    (folder / "p.json").write_text(json.dumps([{**phrase, "sents": "the sky"}]))
    minigpt4("evaluate", "refer", "--questions", "p.json", "--images", ".", "--out", "report")
    record = json.loads((folder / "report/refer.jsonl").read_text())
    assert record["question"] == "[refer] give me the location of the sky"
    assert record["right"] == [0, 0, 50, 50]


def test_vqa_asks_and_goes_on_from_its_ledger(minigpt4, folder):
    records = [
        {"image": "a.png", "question": "say Two.", "answers": ["2"] * 4 + ["3"] * 6},
        {"image": "b.jpg", "question": "say red", "answer": "blue"},
    ]
    (folder / "q.json").write_text(json.dumps(records))
    asked = ("evaluate", "vqa", "--questions", "q.json", "--images", ".", "--prompt", "{question}")
    shown = minigpt4(*asked, "--out", "report", "--model", "somewhere")
    assert (shown.status, shown.err) == (0, "The report is in report/vqa.html.\n")
    assert shown.out.splitlines()[1].split() == ["50.0%", "2", "0", "1"]
    ledger = (folder / "report/vqa.jsonl").read_text()
    again = minigpt4(*asked, "--out", "report", "--model", "somewhere")
    assert (again.out, (folder / "report/vqa.jsonl").read_text()) == (shown.out, ledger)


def test_demo(minigpt4, folder):
    shown = minigpt4("evaluate", "demo", "--scenes", "3", "--seed", "5", "--out", "report")
    assert (shown.status, shown.err) == (0, "The report is in report/demo.html.\n")
    assert shown.out.startswith("3 scenes held out of training (seed 5)\n")
    assert len((folder / "report" / "demo.jsonl").read_text().splitlines()) == 3
    again = minigpt4(
        "evaluate", "demo", "--scenes", "3", "--seed", "5", "--compare", "report/demo.json"
    )
    assert again.status == 0
    assert again.out.splitlines()[2].split()[-1] == "+0.0"
