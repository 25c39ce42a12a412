"""The chat page as a person uses it, in a real browser."""

import base64
import logging
import re
from pathlib import Path

import httpx
import pytest
from page_server import KEY, PICTURES
from page_steps import (
    ANSWERS,
    BOX,
    PICTURES_ASKED,
    ask,
    begin,
    open_page,
    put_pictures,
    texts,
    wait_for,
    wait_for_count,
)

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
FIRST = "There are two shapes on a white background: a large blue triangle"


def last_answer(page):
    """What the last row says, or nothing while there is none."""
    return (texts(page, ANSWERS) or [""])[-1]


def test_upload_ask_and_a_second_turn(page, serving):
    page.wait_for_selector("#about:has-text('demo answers. It knows only drawn scenes.')")
    # This server does not explain: nothing offers a look at a word.
    assert page.locator("#look").count() == 0
    assert "Click a word" not in page.locator("#about").inner_text()
    put_pictures(page, PICTURES / "two.png")
    # It is shown as it grows, a few words at a time.
    seen = set()
    with serving.slowly():
        page.press(BOX, "Enter")
        wait_for(lambda: seen.update(texts(page, ANSWERS)) or len(seen) > 3)
    page.wait_for_selector("#stop:disabled")
    (answer,) = texts(page, ANSWERS)
    assert all(answer.startswith(text) for text in seen - {"…"})
    assert answer.startswith(FIRST)
    ask(page, "How many shapes are there?")
    assert "two" in texts(page, ANSWERS)[1]
    assert page.locator(PICTURES_ASKED).count() == 1


def test_text_and_a_picture_are_pasted_where_the_question_is_typed(page):
    page.fill(BOX, "")
    page.focus(BOX)
    page.keyboard.insert_text("How many shapes are there?")
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+x")
    assert page.input_value(BOX) == ""
    page.keyboard.press("Control+v")
    page.evaluate(
        """async (address) => {
            const picture = new File([await (await fetch(address)).blob()], "pasted.png",
                                     { type: "image/png" });
            const clipboardData = new DataTransfer();
            clipboardData.items.add(picture);
            document.activeElement.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        "data:image/png;base64," + base64.b64encode((PICTURES / "one.png").read_bytes()).decode(),
    )
    page.wait_for_selector("#question img")
    assert page.input_value(BOX) == "How many shapes are there?"
    page.press(BOX, "Enter")
    page.wait_for_selector(f"{ANSWERS}:has-text('one')")


def test_behind_a_proxy_as_documented_the_page_asks_back_where_it_was_found(serving, caplog):
    caplog.set_level(logging.INFO, "minigpt4_runtime.server")
    block = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("```nginx")[2]
    values = {
        "$http_host": "pictures.example", "$scheme": "https", "$remote_addr": "203.0.113.7",
        '""': "close",
    }  # fmt: skip
    lines = re.findall(r"proxy_set_header (\S+) ([^;]+);", block.partition("```")[0])
    config = httpx.get(
        f"{serving.url}/config", headers={name: values[value] for name, value in lines}
    ).json()
    assert config["root"] == "https://pictures.example"
    wait_for(lambda: any("203.0.113.7" in str(vars(record)) for record in caplog.records))


def test_an_example_is_clicked_and_an_answer_retried_and_cleared(page, serving):
    page.click("#dialogue img[src*='one.png']")
    page.wait_for_selector("#question img")
    ask(page, "Describe this picture.")
    first = last_answer(page)
    assert first.endswith("top right.")
    with serving.slowly():
        page.click("#retry")
        wait_for(lambda: last_answer(page) != first)
    page.wait_for_selector("#stop:disabled")
    assert texts(page, ANSWERS) == [first]
    page.click("#clear")
    page.wait_for_selector("#dialogue .example")
    assert texts(page, ANSWERS) == []
    assert page.input_value(BOX) == "Describe this picture."


def test_no_question_is_said_and_hides_nothing(page):
    ask(page, "How many shapes are there?")
    page.fill(BOX, " ")
    # What comes before the page knows that an answer has ended is not taken.
    toast = ".toast-body:has-text('Type a question')"
    wait_for(lambda: page.press(BOX, "Enter") or page.query_selector(toast))
    assert not page.query_selector_all("#dialogue .error, #question .error")
    assert len(texts(page, ANSWERS)) == 1


def test_one_answer_grows_at_a_time(page, serving):
    put_pictures(page, PICTURES / "four.png")
    with serving.slowly():
        begin(page, "Describe this picture.")
        wait_for(lambda: len(last_answer(page)) > 40)
        page.click("#retry")
        wait_for(lambda: len(last_answer(page)) < 40)
        wait_for(lambda: len(last_answer(page)) > 10)
        wait_for(lambda: serving.model.stats().num_running == 1)
        begin(page, "Describe it once more.")
        wait_for_count(page, ANSWERS, 2)
        # The browser has not been told that the last one has ended. Once is enough, twice no harm.
        page.fill(BOX, "How many shapes are there?")
        page.press(BOX, "Enter")
        page.press(BOX, "Enter")
        wait_for_count(page, ANSWERS, 3)
    page.wait_for_selector("#stop:disabled")
    wait_for(lambda: serving.model.stats().num_running == 0)
    wait_for(lambda: "four shapes" in last_answer(page))
    found = texts(page, ANSWERS)
    assert len(found) == 3
    assert all("bottom left" not in each for each in found[:2])


def test_stop_ends_the_answer_on_the_server_too(page, serving):
    put_pictures(page, PICTURES / "four.png")
    with serving.slowly():
        begin(page, "Describe this picture.")
        wait_for(lambda: len(last_answer(page)) > 10)
        page.click("#stop")
        wait_for(lambda: serving.model.stats().num_running == 0)
    # Whatever was on its way has come by the time that another question is answered.
    ask(page, "How many shapes are there?")
    assert len(texts(page, ANSWERS)) == 2
    assert "bottom left" not in texts(page, ANSWERS)[0]


def test_a_broken_picture_is_named_and_the_question_comes_back(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((PICTURES / "two.png").read_bytes()[:300])
    put_pictures(page, broken)
    page.fill(BOX, "What is it?")
    page.press(BOX, "Enter")
    toast = page.wait_for_selector(".toast-body")
    assert re.search("damaged|cut short|cannot", toast.inner_text())
    page.wait_for_function(f"document.querySelector('{BOX}').value === 'What is it?'")


def test_what_is_typed_while_an_answer_grows_stays(page, serving):
    put_pictures(page, PICTURES / "two.png")
    with serving.slowly():
        begin(page, "Describe this picture.")
        page.fill(BOX, "And where is the star?")
    page.wait_for_selector("#stop:disabled")
    # The page takes it as soon as it knows that the answer has ended.
    asked = "#dialogue :text('And where is the star?')"
    wait_for(lambda: page.press(BOX, "Enter") or page.query_selector(asked))


def test_nothing_comes_from_elsewhere_and_a_wide_window_is_used(tab, serving):
    asked = []

    def remember(request):
        asked.append(request.url)

    tab.on("request", remember)
    page = open_page(tab, serving.url)
    tab.remove_listener("request", remember)
    assert f"{serving.url}/" in asked
    assert not [url for url in asked if not url.startswith((serving.url, "data:", "blob:"))]
    # Without a width of its own the page would be as wide as its words.
    assert page.locator("#dialogue").bounding_box()["width"] > 500
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_with_keys_the_page_asks_for_one(browser, guarded):
    refused = httpx.get(guarded.url)
    assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
    known = browser.new_context(http_credentials={"username": "any", "password": KEY})
    page = known.new_page()
    assert page.goto(guarded.url).status == 200
    page.wait_for_selector("#about strong")
    ask(page, "How many shapes are there?")
    assert last_answer(page).endswith(".")
    known.close()
