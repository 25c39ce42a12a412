"""AMBER's files are read as published, and the numbers are those of its own script."""

import json

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation import amber

# Made by hand in the published layout.
KINDS = {
    1005: ("discriminative-attribute-state", "yes"),
    1006: ("discriminative-attribute-number", "no"),
    1007: ("discriminative-hallucination", "no"),
    1008: ("relation", "no"),
    1009: ("discriminative-relation", "yes"),
}
QUERIES = [
    {"id": number, "image": "1.png", "query": "Is it?" if number > 1 else "Describe this image."}
    for number in (1, *KINDS)
]
ANSWERS = {
    1: "A lake. No boat.", 1005: "Yes, it is.", 1006: "It is: yes", 1007: "NO!", 1008: "Not so.",
    1009: "no.",
}  # fmt: skip


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_answers_are_scored_and_written_as_the_script_takes_them(tmp_path, images):
    asked = amber.read_questions(write(tmp_path / "q.json", QUERIES))
    responses = amber.as_responses(asked, ANSWERS)
    assert [each["response"] for each in responses] == [
        "A lake. No boat.", "Yes", "Yes", "No", "Not so.", "No",
    ]  # fmt: skip
    truths = [{"id": n, "type": kind, "truth": truth} for n, (kind, truth) in KINDS.items()]
    file = write(tmp_path / "a.json", truths)
    report = amber.judge(asked, ANSWERS, file, images_dir=images, faults=("x is missing.",))
    # Right: 1005 and 1007. No is said of 1007 and 1009, and right of 1006, 1007 and 1008.
    assert report.dimensions["all"] == {
        "accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "questions": 5,
        "neither": 1,
    }  # fmt: skip
    assert report.dimensions["existence"]["f1"] == 1
    assert report.dimensions["attribute"]["precision"] is None
    assert report.dimensions["relation"]["questions"] == 2
    assert len(report.as_mapping()["answers"]) == len(report.as_rows().rows) == 5
    page = report.as_page()
    assert page.count("<article") == 3
    assert "x is missing." in page
    with pytest.raises(ConfigError, match=r"a\.json has no yes or no for id 1006\."):
        amber.judge(asked, ANSWERS, write(tmp_path / "a.json", truths[:1]), images_dir=images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no query"),
        ([{"id": "1", "image": "a", "query": "b"}], "Query 1 of"),
        ([QUERIES[0], QUERIES[0]], "id 1 comes twice"),
    ],
)
def test_other_layouts(tmp_path, content, message):
    with pytest.raises(ConfigError) as error:
        amber.read_questions(write(tmp_path / "q.json", content))
    assert message in str(error.value)
