"""The chat page as a person uses it, in a real browser."""

import base64
import logging
import re
from pathlib import Path

import httpx
import pytest
from page_server import KEY, PICTURES
from page_steps import wait_for

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
FIRST = "There are two shapes on a white background: a large blue triangle"


def put_picture(page, picture):
    """Drop a picture where the page takes one, and wait until it is shown."""
    page.set_input_files("#question input[type=file]", picture)
    page.wait_for_selector("#question img")


def ask(page, question):
    page.fill("#question textarea", question)
    page.keyboard.press("Enter")


def answers(page):
    """What the rows say, all read at one moment: the page makes them anew as they grow."""
    return page.eval_on_selector_all(
        "#dialogue .bot .prose", "rows => rows.map((row) => row.innerText.trim())"
    )


def last_answer(page):
    """What the last row says, or nothing while there is none."""
    return (answers(page) or [""])[-1]


def test_upload_ask_and_a_second_turn(page, serving, tmp_path):
    wait_for(lambda: "demo answers. It knows only drawn scenes." in page.inner_text("#about"))
    put_picture(page, PICTURES / "two.png")
    page.focus("#question textarea")
    # It is shown as it grows, a few words at a time.
    seen = set()
    with serving.slowly():
        page.keyboard.press("Enter")
        wait_for(lambda: seen.update(answers(page)) or len(seen) > 4)
    wait_for(lambda: last_answer(page).endswith("."))
    assert all(answers(page)[0].startswith(text) for text in seen - {"…"})
    assert answers(page)[0].startswith(FIRST)
    # Before the page knows that its own answer has ended, the box's next question is not taken.
    page.wait_for_selector("#stop:disabled")
    ask(page, "How many shapes are there?")
    wait_for(lambda: len(answers(page)) == 2 and "two" in answers(page)[1])
    assert len(page.query_selector_all("#dialogue .user img")) == 1
    page.screenshot(path=tmp_path / "two-turns.png")


def test_a_picture_is_pasted_where_the_question_is_typed(page):
    page.focus("#question textarea")
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
    ask(page, "How many shapes are there?")
    wait_for(lambda: answers(page) and "one" in answers(page)[-1])


def test_text_is_pasted_as_ever(page):
    page.fill("#question textarea", "")
    page.focus("#question textarea")
    page.keyboard.insert_text("Where is the star?")
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+x")
    page.keyboard.press("Control+v")
    assert page.input_value("#question textarea") == "Where is the star?"


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
    wait_for(lambda: answers(page) and answers(page)[-1].endswith("top right."))
    first = answers(page)
    with serving.slowly():
        page.click("#retry")
        wait_for(lambda: answers(page) != first)
    wait_for(lambda: answers(page) == first)
    page.click("#clear")
    wait_for(lambda: not answers(page) and page.query_selector("#dialogue .example"))
    assert page.input_value("#question textarea") == "Describe this picture."


def test_no_question_is_said_and_hides_nothing(page):
    ask(page, "How many shapes are there?")
    wait_for(lambda: answers(page) and answers(page)[0].endswith("."))
    # What comes before an answer has ended is not taken.
    toast = ".toast-body:has-text('Type a question')"
    wait_for(lambda: ask(page, " ") or page.query_selector(toast))
    assert not page.query_selector_all("#dialogue .error, #question .error")
    assert len(answers(page)) == 1


def test_one_answer_grows_at_a_time(page, serving):
    put_picture(page, PICTURES / "four.png")
    with serving.slowly():
        ask(page, "Describe this picture.")
        wait_for(lambda: len(last_answer(page)) > 20)
        page.click("#retry")
        wait_for(lambda: len(last_answer(page)) < 10)
        wait_for(lambda: len(last_answer(page)) > 10)
        wait_for(lambda: serving.model.stats().num_running == 1)
        ask(page, "How many shapes are there?")
        wait_for(lambda: len(answers(page)) == 2)
    wait_for(lambda: last_answer(page).endswith("."))
    wait_for(lambda: serving.model.stats().num_running == 0)
    assert "bottom left" not in answers(page)[0]


def test_stop_ends_the_answer_on_the_server_too(page, serving):
    put_picture(page, PICTURES / "four.png")
    with serving.slowly():
        ask(page, "Describe this picture.")
        wait_for(lambda: len(last_answer(page)) > 10)
        page.click("#stop")
        wait_for(lambda: serving.model.stats().num_running == 0)
    # Whatever was on its way has come by the time that another question is answered.
    ask(page, "How many shapes are there?")
    wait_for(lambda: len(answers(page)) == 2 and last_answer(page).endswith("."))
    assert "bottom left" not in answers(page)[0]


def test_a_broken_picture_is_named_and_the_question_comes_back(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((PICTURES / "two.png").read_bytes()[:300])
    page.set_input_files("#question input[type=file]", broken)
    page.wait_for_selector("#question img", state="attached")
    ask(page, "What is it?")
    toast = page.wait_for_selector(".toast-body")
    assert re.search("damaged|cut short|cannot", toast.inner_text())
    page.screenshot(path=tmp_path / "broken.png.png")


def test_a_wide_window_is_used_before_anything_was_asked(page):
    """Without a width of its own the page would be as wide as its words."""
    place = page.locator("#dialogue").bounding_box()
    assert place["width"] > 500
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_what_is_typed_while_an_answer_grows_stays(page):
    put_picture(page, PICTURES / "two.png")
    ask(page, "Describe this picture.")
    wait_for(lambda: page.input_value("#question textarea") == "")
    page.fill("#question textarea", "And where is the star?")
    wait_for(lambda: last_answer(page).endswith("."))
    page.focus("#question textarea")
    # The page takes it as soon as it knows that the answer has ended.
    asked = "#dialogue :text('And where is the star?')"
    wait_for(lambda: page.keyboard.press("Enter") or page.query_selector(asked))


def test_nothing_comes_from_elsewhere(browser, serving):
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(serving.url)
    page.wait_for_selector("#question textarea")
    page.close()
    assert asked
    assert not [url for url in asked if not url.startswith((serving.url, "data:", "blob:"))]


def test_with_keys_the_page_asks_for_one(browser, guarded):
    refused = httpx.get(guarded.url)
    assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
    known = browser.new_context(http_credentials={"username": "any", "password": KEY})
    page = known.new_page()
    assert page.goto(guarded.url).status == 200
    page.wait_for_selector("#question textarea")
    ask(page, "How many shapes are there?")
    wait_for(lambda: answers(page) and answers(page)[-1].endswith("."))
    known.close()
