"""Boxes on the page: an answer's on its picture, and one that a person drags to ask about it."""

import pytest
from page_server import PICTURES, Serving
from page_steps import (
    ANSWERS,
    BOX,
    QUESTIONS,
    ask,
    open_page,
    put_pictures,
    texts,
    wait_for,
    wait_for_count,
)

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.text.boxes import find_boxes

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

BOXES = "#dialogue .user-row .box"
PICTURE = "#dialogue .user-row img"
TEXTS = (
    "<p>a red ball</p> {<5><6><50><60>}<delim>{<50><60><5><6>} {<1><2><3><4>}",
    "<p> </p>{<0><0><100><100>} and <p>two\nlines</p>\n{ <7> < 8 ><9>\n<10> }, then {<1><1><2><2>}",
    "<p>one <p>two</p> {<1><2><3><101>} {<1><2><3>} {<1><2><3>}<p>x</p><p>y</p>{<9><9><9><9>}",
    "{<٣><1><2><3>} <p>😀</p> {<001><02><3><4>} <p>left</p> word {<1><2><3><4>} <p> {<1><2><3><4>}",
)


@pytest.fixture(scope="module")
def model(tls_once):
    """The bundled model that writes boxes."""
    with MiniGPT4.load("demo-boxes", device="cpu") as loaded:
        yield loaded


def at_rest(page):
    """Where the last picture is, once it has not moved for a while: the page scrolls smoothly."""
    seen = []

    def stays():
        seen.append(page.locator(PICTURE).last.bounding_box())
        page.wait_for_timeout(50)
        return len(seen) >= 8 and all(each == seen[-1] for each in seen[-8:])

    wait_for(stays)
    return seen[-1]


def drag(page, start, end):
    """From one place of the picture to another, in shares of its sides."""
    page.locator(PICTURE).last.scroll_into_view_if_needed()
    area = at_rest(page)

    def place(share):
        return (area["x"] + share[0] * area["width"], area["y"] + share[1] * area["height"])

    page.mouse.move(*place(start))
    page.mouse.down()
    page.mouse.move(*place(end), steps=3)
    page.mouse.up()


def drawn_places(page):
    """Left, top, right and bottom of each drawn box, in shares of the picture's sides."""
    return page.evaluate("""() => {
        const picture = document.querySelector("#dialogue .user-row img").getBoundingClientRect();
        return [...document.querySelectorAll("#dialogue .user-row .box")].map((box) => {
            const { left, top, right, bottom } = box.getBoundingClientRect();
            const across = [left, right].map((each) => (each - picture.left) / picture.width);
            const down = [top, bottom].map((each) => (each - picture.top) / picture.height);
            return [across[0], down[0], across[1], down[1]];
        });
    }""")


@pytest.mark.parametrize("text", TEXTS)
def test_the_page_finds_the_boxes_that_the_program_finds(page, text):
    found = page.evaluate("(text) => chatBoxes.find(text)", text)
    assert [(box["label"], tuple(box["corners"])) for box in found] == [
        (box.label, box.box) for box in find_boxes(text, (100, 100))
    ]


def test_an_answers_boxes_are_drawn_on_its_picture_and_stay(page, serving):
    put_pictures(page, PICTURES / "three.png")
    ask(page, "[detection] Describe this image.")
    wait_for_count(page, BOXES, 3)
    expected = serving.model.describe(
        PICTURES / "three.png", "Describe this image.", task="detection"
    )
    assert page.locator(BOXES).all_inner_texts() == [box.label for box in expected.boxes]
    width, height = expected.picture_size
    for place, box in zip(drawn_places(page), expected.boxes, strict=True):
        sides = (width, height, width, height)
        wanted = [number / side for number, side in zip(box.box, sides, strict=True)]
        assert place == pytest.approx(wanted, abs=0.02)
    # Its labels are bold in the answer.
    bold = page.locator(f"{ANSWERS} strong").all_inner_texts()
    assert bold == [box.label for box in expected.boxes]
    page.reload()
    wait_for_count(page, BOXES, 3)
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function(
        """() => {
            const [picture, layer] = ["#dialogue .user-row img", "#dialogue .boxes"].map(
                (each) => document.querySelector(each).getBoundingClientRect());
            return 0 < picture.left && picture.right < 360 && ["left", "top", "width", "height"]
                .every((side) => Math.abs(picture[side] - layer[side]) < 1);
        }"""
    )


def test_a_dragged_box_becomes_a_question(page):
    put_pictures(page, PICTURES / "three.png")
    ask(page, "[caption] Describe this image.")
    wait_for_count(page, BOXES, 0)
    page.locator(PICTURE).click()
    assert page.input_value(BOX) == ""
    drag(page, (0.61, 0.36), (0.46, 0.51))
    question = page.input_value(BOX)
    assert question.startswith("[identify] {")
    (asked,) = find_boxes(question, (100, 100))
    assert asked.box == pytest.approx((46, 36, 61, 51), abs=1)
    wait_for_count(page, f"{BOXES}.asked", 1)
    ask(page, question)
    assert texts(page, QUESTIONS)[-1] == question
    assert texts(page, ANSWERS)[-1] == "small blue circle"
    wait_for_count(page, f"{BOXES}.asked", 1)
    page.click("#undo")
    wait_for_count(page, BOXES, 0)


def test_a_model_without_tasks_has_no_boxes(tab, serving):
    with MiniGPT4.load(device="cpu") as plain:
        server = Serving(plain)
        page = open_page(tab, server.url)
        put_pictures(page, PICTURES / "one.png")
        ask(page, "{<10><10><50><50>}")
        drag(page, (0.2, 0.2), (0.8, 0.8))
        assert page.input_value(BOX) == ""
        assert page.locator(BOXES).count() == 0
        tab.goto("about:blank")
        server.close()
