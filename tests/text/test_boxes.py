"""Boxes are found as the original's demo finds them, where it finds what is written."""

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime.messages import Box
from minigpt4_runtime.text.boxes import find_boxes
from minigpt4_runtime.text.prompt import TEMPLATES

GOLDEN = Path(__file__).parents[1] / "goldens/minigptv2/boxes.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["texts"]
# Where the original draws nothing or something else: a box after a box, numbers in a sentence, a
# label that never ends, and numbers that are no hundredths.
ELSE = {
    "{<1><2><3><4>}{<5><6><7><8>}": 2,
    "it is at 10, 20, 30 and 40": 0,
    "<p>a {<1><2><30><40>}": 1,
    "<p>out</p> {<-5><0><150><99>}": 0,
}
SIZE = (640, 480)


def boxes(text, size=SIZE):
    return [(found.label, found.box) for found in find_boxes(text, size)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['size'][0]} {case['text']}")
def test_the_originals_rectangles(case):
    # The original's page writes its texts as HTML; a model does not.
    text = html.unescape(case["text"])
    found = boxes(text, tuple(case["drawn_on"] or case["size"]))
    if text in ELSE:
        assert len(found) == ELSE[text]
        return
    drawn = [tuple(each["box"]) for each in case["boxes"]]
    # The original draws two corners as they come.
    assert [box for _, box in found] == [
        (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in drawn
    ]
    assert [label for label, _ in found if label] == case["labels"]


def test_a_label_belongs_to_the_boxes_right_behind_it():
    text = (
        "<p>a ball</p> {<0><0><50><50>}<delim>{<50><50><100><100>} at {<1><1><2><2>} "
        "<p>b</p>{<3><3><4><4>} {<5><5><6><6>} <p> </p> {<7><7><8><8>}"
    )
    assert [label for label, _ in boxes(text)] == ["a ball", "a ball", None, "b", "b", None]
    assert boxes("<p>lost</p> <p>x < y</p> {<0><0><9><9>}") == [("x < y", (0, 0, 57, 43))]
    assert boxes("<p>two\nlines</p>\n{ <0><0> <9> < 9 > }") == [("two\nlines", (0, 0, 57, 43))]


@pytest.mark.parametrize(
    "text",
    ["", "{", "{<1><2><3>}", "{<1><2><3><4>", "{<1><2><3><4><5>}", "{<a><2><3><4>}", "<p>x</p>",
     "{<1><2><3><101>}", "{<1><2><3><1000>}", "{<١><٢><٣><٤>}", "{<1.5><2><3><4>}", "<1><2><3><4>",
     "<p><p><p>", "{<><><><>}"],
)  # fmt: skip
def test_what_is_no_whole_box_is_text(text):
    assert boxes(text) == []


def test_corners_reach_the_edges_and_stay_inside():
    assert boxes("{<0><0><100><100>}") == [(None, (0, 0, 640, 480))]
    assert boxes("{<100><100><0><0>}") == [(None, (0, 0, 640, 480))]
    assert boxes("{<99><1><99><1>}", (3, 5)) == [(None, (2, 0, 2, 0))]


numbers = st.integers(0, 100)
labels = st.none() | st.text(st.sampled_from("ab 猫é<>{}"), min_size=1, max_size=8).map(
    lambda text: text.strip() or "c"
).filter(lambda text: "<p>" not in text)  # fmt: skip
fillers = st.text(st.sampled_from("xy .,<>p/{猫\n0"), max_size=12).filter(
    lambda text: "<p>" not in text
)


def written(corners):
    return "{" + "".join(f"<{number}>" for number in corners) + "}"


@given(
    st.lists(st.tuples(labels, st.tuples(numbers, numbers, numbers, numbers), fillers)),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_what_is_written_is_found_where_it_stands(parts, size):
    text, expected = "", []
    for label, (x1, y1, x2, y2), filler in parts:
        # A word between: what stood before is no label of this box.
        text += f" {filler} word " + (f"<p>{label}</p> " if label else "")
        written_box = written((x1, y1, x2, y2))
        expected.append((label, (x1, y1, x2, y2), len(text)))
        text += written_box
    found = find_boxes(text, size)
    assert [each.start for each in found] == [start for _, _, start in expected]
    for each, (label, (x1, y1, x2, y2), _) in zip(found, expected, strict=True):
        assert each.label == label
        assert text[each.start : each.stop] == written((x1, y1, x2, y2))
        exact = (min(x1, x2) * size[0], min(y1, y2) * size[1],
                 max(x1, x2) * size[0], max(y1, y2) * size[1])  # fmt: skip
        assert all(0 <= hundredths - 100 * pixel < 100
                   for hundredths, pixel in zip(exact, each.box, strict=True))  # fmt: skip


@given(st.text(st.sampled_from("{}<>p/delim 0123456789猫\n"), max_size=60))
def test_any_text_is_read(text):
    for each in find_boxes(text, SIZE):
        assert isinstance(each, Box)
        assert re.fullmatch(r"\{(\s*<\s*[0-9]{1,3}\s*>\s*){4}\}", text[each.start : each.stop])
        assert 0 <= each.box[0] <= each.box[2] <= 640
        assert 0 <= each.box[1] <= each.box[3] <= 480


def test_the_template_that_was_taught_boxes_has_them():
    assert [name for name, template in TEMPLATES.items() if template.has_boxes] == ["minigptv2"]


def test_a_long_text_takes_no_long_time():
    """Each character is looked at a few times, whatever is begun and never ended."""
    for piece in ("<p>", "{<1>", "<p>x</p> ", "{" + " " * 50, "< " * 20):
        assert boxes(piece * (200_000 // len(piece))) == []
