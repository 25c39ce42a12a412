"""`minigpt4 explain`: the answer on stdout, its page in a folder, a sentence for bad input."""

import csv
import json
from pathlib import Path

PICTURE = Path(__file__).parents[2] / "examples/images/two.png"


def test_the_answer_and_its_page(real_minigpt4, tmp_path):
    asked = ("--prompt", "How many shapes are there?", "--out", tmp_path / "why")
    done = real_minigpt4("explain", PICTURE, *asked)
    assert (done.status, done.out) == (0, "There are two shapes.\n")
    assert f"The page is {tmp_path / 'why/explain.html'}." in done.err
    mapping = json.loads((tmp_path / "why/explain.json").read_text("utf-8"))
    assert mapping["answer"] == "There are two shapes."
    rows = list(csv.DictReader((tmp_path / "why/explain.csv").open(encoding="utf-8")))
    assert [row["text"] for row in rows] == [piece["text"] for piece in mapping["pieces"]]
    (sure,) = (float(row["log_probability"]) for row in rows if row["text"].strip() == "two")

    # An answer that is not the model's is explained as well, and was not likely.
    done = real_minigpt4("explain", PICTURE, *asked, "--answer", "There are four shapes.")
    assert (done.status, done.out) == (0, "There are four shapes.\n")
    rows = list(csv.DictReader((tmp_path / "why/explain.csv").open(encoding="utf-8")))
    (unsure,) = (float(row["log_probability"]) for row in rows if row["text"].strip() == "four")
    assert unsure < -1 < sure


def test_bad_input_is_named_before_a_model_is_loaded(real_minigpt4, tmp_path):
    for arguments, sentence in (
        ((PICTURE.parent,), "is a folder. Name one picture."),
        ((PICTURE, "--answer", " "), "--answer is empty: there is no word to explain."),
        ((PICTURE, "--out", tmp_path / "no/where"), "there is no folder"),
    ):
        done = real_minigpt4("explain", "--out", tmp_path / "why", *arguments)
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
        assert sentence in done.err
    done = real_minigpt4("explain", tmp_path / "none.png", "--out", tmp_path / "why")
    assert (done.status, done.out) == (1, "")
    assert "does not exist" in done.err
    assert not (tmp_path / "why").exists()
