"""Boxes are seen on every ground, and their labels cover no other label."""

import itertools

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_runtime.images import drawing
from minigpt4_runtime.images.drawing import draw_boxes
from minigpt4_runtime.messages import Box


def box(label, *corners):
    return Box(label, corners, 0, 0)


@pytest.fixture
def labels(monkeypatch):
    """The places of labels, as they are chosen."""
    found, place = [], drawing._place
    monkeypatch.setattr(drawing, "_place", lambda *given: found.append(place(*given)) or found[-1])
    return found


@pytest.mark.parametrize("ground", ["white", "black", "#0072B2", "#E69F00", "#808080"])
def test_a_box_is_seen_on_every_ground(ground):
    picture = Image.new("RGB", (800, 600), ground)
    drawn = numpy.asarray(draw_boxes(picture, [box("a cat", 200, 200, 400, 500)]), dtype=int)
    across = drawn[350, 190:215]
    assert len({tuple(pixel) for pixel in across}) >= 2
    # A colour and black side by side: one of them differs from any ground.
    assert abs(across - numpy.asarray(picture)[0, 0]).sum(axis=1).max() > 90
    assert (drawn[350, 250:350] == numpy.asarray(picture)[0, 0]).all()


def test_the_picture_itself_is_not_changed():
    picture = Image.new("RGB", (800, 600), "white")
    draw_boxes(picture, [box("a", 0, 0, 800, 600)])
    assert picture.getcolors() == [(480_000, (255, 255, 255))]


def test_one_label_has_one_colour_and_others_have_others():
    def colours(drawn):
        return {colour for _, colour in drawn.getcolors(100_000)}

    white = Image.new("RGB", (800, 600), "white")
    one = colours(draw_boxes(white, [box("a", 100, 100, 200, 200), box("a", 300, 300, 400, 400)]))
    two = colours(draw_boxes(white, [box("a", 100, 100, 200, 200), box("b", 300, 300, 400, 400)]))
    assert (230, 159, 0) not in one
    assert (0, 114, 178) in one
    assert {(0, 114, 178), (230, 159, 0)} <= two


def test_a_small_picture_is_enlarged_so_that_labels_can_be_read():
    drawn = draw_boxes(Image.new("RGB", (60, 40)), [box("a", 0, 0, 30, 40)])
    assert drawn.size == (480, 320)
    assert draw_boxes(Image.new("RGB", (481, 40)), []).size == (481, 40)


def test_labels_of_boxes_in_one_place_stand_apart(labels):
    boxes = [box(f"thing {number}", 200, 200, 400, 400) for number in range(6)]
    draw_boxes(Image.new("RGB", (800, 600)), boxes)
    assert len(labels) == 6
    for one, other in itertools.combinations(labels, 2):
        assert drawing._common(one, other) == 0


def test_what_no_font_can_write_has_its_number(monkeypatch):
    monkeypatch.setattr(drawing, "_OTHER_FONTS", ())
    drawing._fonts.cache_clear()
    white = Image.new("RGB", (800, 600), "white")
    unknown, none = (draw_boxes(white, [box(label, 0, 0, 99, 99)]) for label in ("\ue000", None))
    assert unknown.tobytes() == none.tobytes()
    drawing._fonts.cache_clear()


corners = st.tuples(*[st.integers(0, 100)] * 4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.none() | st.text(max_size=60), corners), max_size=8),
    st.sampled_from([(500, 400), (3, 700), (700, 3), (1, 1), (481, 479)]),
)
def test_any_boxes_are_drawn(parts, size):
    boxes = [
        box(label, min(x1, x2) * size[0] // 100, min(y1, y2) * size[1] // 100,
            max(x1, x2) * size[0] // 100, max(y1, y2) * size[1] // 100)
        for label, (x1, y1, x2, y2) in parts
    ]  # fmt: skip
    drawn = draw_boxes(Image.new("RGB", size), boxes)
    assert drawn.width * size[1] == drawn.height * size[0]
