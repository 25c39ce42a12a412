"""Turns on the page: pictures in them, edited, taken back and copied, and where they are seen."""

import pytest
from page_server import PICTURES
from page_steps import (
    ANSWERS,
    BOX,
    PICTURES_ASKED,
    QUESTIONS,
    ask,
    begin,
    open_page,
    put_pictures,
    texts,
    wait_for_count,
)

from minigpt4_runtime.web.dialogue import Turn, as_messages

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

BUTTONS = ("stop", "retry", "undo", "clear", "save-md", "save-json")


def active(page):
    return [name for name in BUTTONS if page.locator(f"#{name}").is_enabled()]


def test_a_question_takes_several_pictures(page, serving, monkeypatch):
    asked, submit = [], serving.model.submit
    monkeypatch.setattr(
        serving.model,
        "submit",
        lambda *given, **more: asked.append(given[0]) or submit(*given, **more),
    )
    put_pictures(page, PICTURES / "one.png", PICTURES / "two.png")
    ask(page, "Describe these.")
    assert page.locator(PICTURES_ASKED).count() == 2
    assert page.locator("#question img").count() == 0
    ask(page, "How many shapes are there?")
    contents = [len(message.content) for message in asked[-1]]
    assert contents == [3, 1, 1]


def test_examples_gather_in_the_question_box(page):
    for name in ("one", "three", "one"):
        page.click(f"#dialogue .example:has(img[src*='{name}.png'])")
        page.wait_for_selector(f"#question img[src*='{name}.png']")
    wait_for_count(page, "#question img", 2)


def test_an_edited_question_is_asked_anew_with_its_pictures(page):
    put_pictures(page, PICTURES / "two.png")
    ask(page, "Describe this picture.")
    (first,) = texts(page, ANSWERS)
    ask(page, "Where is the triangle?")
    page.click("#dialogue [aria-label=Edit] >> nth=0")
    page.fill("#dialogue textarea", "How many shapes are there?")
    page.click("#dialogue [aria-label=Submit]")
    wait_for_count(page, QUESTIONS, 1)
    page.wait_for_selector("#stop:disabled")
    assert texts(page, QUESTIONS) == ["How many shapes are there?"]
    (again,) = texts(page, ANSWERS)
    assert again != first
    assert "two" in again
    assert page.locator(PICTURES_ASKED).count() == 1


def test_undo_takes_the_last_turn_back_into_the_box(page):
    put_pictures(page, PICTURES / "two.png")
    ask(page, "Describe this picture.")
    ask(page, "How many shapes are there?")
    page.click("#undo")
    wait_for_count(page, QUESTIONS, 1)
    assert page.input_value(BOX) == "How many shapes are there?"
    page.click("#undo")
    wait_for_count(page, QUESTIONS, 0)
    page.wait_for_selector("#question img")
    assert page.input_value(BOX) == "Describe this picture."
    ask(page, "How many shapes are there?")
    assert "two" in texts(page, ANSWERS)[0]


def test_only_what_can_be_done_can_be_pressed(page, serving):
    assert active(page) == []
    put_pictures(page, PICTURES / "four.png")
    with serving.slowly():
        begin(page, "Describe this picture.")
        assert active(page) == list(BUTTONS)
        page.click("#stop")
        page.wait_for_selector("#stop:disabled")
    assert active(page) == list(BUTTONS[1:])
    assert page.locator("#dialogue [aria-label=Clear]:visible").count() == 0
    page.click("#clear")
    page.wait_for_selector("#clear:disabled")
    assert active(page) == []


def test_a_question_without_its_answer_stays_in_the_dialogue():
    turns = [Turn("One."), Turn("Two.", (), "2"), Turn("Three.", (), "an answer to be replaced")]
    asked = [(each["role"], each["content"]) for each in as_messages(turns, " In Latin. ")]
    assert [role for role, _ in asked] == ["system", "user", "user", "assistant", "user"]
    assert asked[0][1] == "In Latin."


def test_an_answer_is_copied(page):
    ask(page, "How many shapes are there?")
    page.click("#dialogue .message-buttons-left [aria-label*=Copy]")
    page.wait_for_selector("#dialogue .message-buttons-left [aria-label*=Copied]")
    assert page.evaluate("navigator.clipboard.readText()") == texts(page, ANSWERS)[0]


@pytest.mark.parametrize(
    ("width", "height", "colour"), [(360, 640, "dark"), (800, 1000, "light"), (1400, 900, "dark")]
)
def test_question_and_answer_are_in_view_on_every_screen(tab, serving, width, height, colour):
    page = open_page(tab, serving.url, width=width, height=height, colour=colour)
    assert page.evaluate("document.body.classList.contains('dark')") == (colour == "dark")
    for selector in ("#question", "#clear"):
        assert is_in_view(page, selector)
    put_pictures(page, PICTURES / "one.png", PICTURES / "two.png", PICTURES / "three.png")
    ask(page, "Where is the triangle?")
    # As one who has gone down to the controls, with the question box still in hand.
    page.focus(BOX)
    page.fill(BOX, "How many shapes are there?")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.keyboard.press("Enter")
    wait_for_count(page, ANSWERS, 2)
    page.wait_for_selector("#stop:disabled")
    page.wait_for_function(
        """([selector, inner]) => {
            const last = [...document.querySelectorAll(selector)].at(-1).getBoundingClientRect();
            const frame = document.querySelector(inner).getBoundingClientRect();
            return last.top >= Math.max(0, frame.top) && last.bottom <= innerHeight;
        }""",
        arg=[ANSWERS, "#dialogue"],
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def is_in_view(page, selector):
    place = page.locator(selector).bounding_box()
    size = page.viewport_size
    return place["x"] >= 0 <= place["y"] and (
        place["x"] + place["width"] <= size["width"]
        and place["y"] + place["height"] <= size["height"]
    )
