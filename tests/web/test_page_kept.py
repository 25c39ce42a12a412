"""What the browser keeps of a dialogue, through a reload and as a file."""

import base64
import json
from dataclasses import asdict

import pytest
from page_server import PICTURES
from page_steps import (
    ANSWERS,
    BOX,
    PICTURES_ASKED,
    QUESTIONS,
    ask,
    begin,
    put_pictures,
    texts,
    wait_for,
    wait_for_count,
)
from PIL import Image

from minigpt4_runtime.web.dialogue import DialogueError, Turn
from minigpt4_runtime.web.kept import read_kept, write_kept

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

DATABASE = """(act) => new Promise((resolve) => {
    const opening = indexedDB.open("minigpt4", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("dialogue");
    opening.onsuccess = () => {
        const change = opening.result.transaction("dialogue", "readwrite");
        const request = eval(act)(change.objectStore("dialogue"));
        change.oncomplete = () => (opening.result.close(), resolve(request.result ?? null));
    };
})"""

DAMAGED = (
    "{ version: 0, turns: [] }",
    "{ version: 1, turns: 7 }",
    "{ version: 1, turns: [{ question: 'a', answer: 'b', pictures: [{ name: 'c', blob: 4 }] }] }",
)


def wait_until_kept(page, num_turns, *, num_answers=None):
    """Until the browser has written the dialogue, by default with an answer for each turn."""
    wanted = [num_turns, num_turns if num_answers is None else num_answers]
    # `wait_for_function` takes the promise itself for what it waits for.
    wait_for(lambda: page.evaluate(
        f"""async () => {{
            const turns = (await ({DATABASE})("(store) => store.get('last')"))?.turns ?? [];
            return [turns.length, turns.filter((turn) => turn.answer).length];
        }}"""
    ) == wanted)  # fmt: skip


def reload(page):
    page.reload()
    page.wait_for_selector("#about strong")


def test_a_reload_keeps_the_dialogue_its_pictures_and_the_colour(page):
    is_dark = "document.body.classList.contains('dark')"
    assert not page.evaluate(is_dark)
    page.click("#colour")
    page.wait_for_function(is_dark)
    put_pictures(page, PICTURES / "one.png", PICTURES / "two.png")
    ask(page, "Describe these.")
    ask(page, "Where is the triangle?")
    before = texts(page, QUESTIONS), texts(page, ANSWERS)
    wait_until_kept(page, 2)
    reload(page)
    page.wait_for_function(is_dark)
    wait_for_count(page, ANSWERS, 2)
    assert (texts(page, QUESTIONS), texts(page, ANSWERS)) == before
    wait_for_count(page, PICTURES_ASKED, 2)
    page.wait_for_function(
        f"[...document.querySelectorAll('{PICTURES_ASKED}')].every((each) => each.naturalWidth > 0)"
    )
    assert page.input_value(BOX) == ""
    ask(page, "How many shapes are there?")
    assert len(texts(page, ANSWERS)) == 3


def test_a_question_that_was_being_answered_can_be_asked_again_after_a_reload(page, serving):
    put_pictures(page, PICTURES / "four.png")
    with serving.slowly():
        begin(page, "Describe this picture.")
        wait_until_kept(page, 1, num_answers=0)
        reload(page)
    wait_for_count(page, ANSWERS, 1)
    assert texts(page, ANSWERS) == ["Stopped before there was an answer."]
    page.click("#retry")
    page.wait_for_selector(f"{ANSWERS}:has-text('bottom left')")


def test_what_was_cleared_stays_away(page):
    ask(page, "How many shapes are there?")
    wait_until_kept(page, 1)
    page.click("#clear")
    page.wait_for_selector("#clear:disabled")
    wait_until_kept(page, 0)
    reload(page)
    page.wait_for_selector("#dialogue .example")
    assert page.input_value(BOX) == "Describe this picture."


def test_a_damaged_or_older_record_is_dropped_and_said_to_be(page):
    for record in DAMAGED:
        page.evaluate(DATABASE, f"(store) => store.put({record}, 'last')")
        reload(page)
        page.wait_for_selector(".toast-body:has-text('damaged or of another version')")
        wait_until_kept(page, 0)
    ask(page, "How many shapes are there?")
    wait_until_kept(page, 1)
    reload(page)
    wait_for_count(page, ANSWERS, 1)


def test_pictures_that_are_too_large_to_keep_are_said_to_be(page, tmp_path):
    size = (2500, 2400)  # As BMP 17 MiB.
    Image.new("RGB", size).save(tmp_path / "large.bmp")
    assert "16 MiB" in page.inner_text("#keeping")
    put_pictures(page, tmp_path / "large.bmp", PICTURES / "two.png")
    ask(page, "Describe these.")
    wait_until_kept(page, 1)
    reload(page)
    page.wait_for_selector(".toast-body:has-text('1 of the pictures in this dialogue')")
    wait_for_count(page, ANSWERS, 1)
    wait_for_count(page, PICTURES_ASKED, 1)


def test_a_dialogue_is_saved_as_json_for_the_api_and_as_markdown(page):
    put_pictures(page, PICTURES / "two.png")
    page.fill("#system textarea, #system input", "Be brief.")
    ask(page, "How many shapes are there?")
    (answer,) = texts(page, ANSWERS)
    with page.expect_download() as saved:
        page.click("#save-json")
    assert saved.value.suggested_filename == "dialogue.json"
    system, user, assistant = json.loads(saved.value.path().read_bytes())["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert assistant == {"role": "assistant", "content": answer}
    picture, text = user["content"]
    head, _, body = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == (PICTURES / "two.png").read_bytes()
    assert text == {"type": "text", "text": "How many shapes are there?"}
    with page.expect_download() as saved:
        page.click("#save-md")
    assert saved.value.suggested_filename == "dialogue.md"
    assert saved.value.path().read_text(encoding="utf-8") == (
        f"*Picture: two.png*\n\n**Question:** How many shapes are there?\n\n{answer}\n"
    )


def test_turns_come_back_as_they_were_kept(tmp_path):
    pictures = (tmp_path / "a.png", tmp_path / "b.png")
    turns = (Turn("What?", pictures, "A star.", "tuned", "Be brief."), Turn("Where?"))
    kept = write_kept(turns)
    again, num_missing = read_kept(kept, lambda name: tmp_path / name)
    assert (list(map(asdict, again)), num_missing) == (list(map(asdict, turns)), 0)
    # So were turns kept that did not know who answered.
    old = kept.replace(',"model":"tuned","system":"Be brief."', "").replace(
        ',"model":"","system":""', ""
    )
    assert "model" not in old
    assert read_kept(old, lambda name: tmp_path / name) == (turns, 0)
    found, num_missing = read_kept(kept, lambda name: None)
    assert (num_missing, [turn.images for turn in found]) == (2, [(), ()])
    assert write_kept(()) == ""


@pytest.mark.parametrize(
    "text",
    ["damaged", "[]", "{}", '{"version": 2, "turns": []}', '{"version": 1}',
     '{"version": 1, "turns": [{"question": "a", "answer": null, "pictures": []}]}',
     "[" * 100_000, "\ud800"],
)  # fmt: skip
def test_what_no_page_kept_is_refused(text):
    with pytest.raises(DialogueError, match="damaged or of another version"):
        read_kept(text, lambda name: None)
