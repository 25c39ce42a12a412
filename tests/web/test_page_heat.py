"""A click on a word of an answer shows on the picture where it looked."""

import json
import re

import pytest
from adapter_folders import write_lora
from page_server import PICTURES, Serving
from page_steps import ask, choose, open_page, put_pictures, set_text, wait_for_count

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

PICTURE = PICTURES / "three.png"
QUESTION = "Describe this image in detail."
HEAT = "#dialogue .heat canvas"
WORD = """([word, number]) => {
    const text = document.createTreeWalker(document.querySelector("#dialogue .bot-row .prose"), 4);
    while (text.nextNode()) {
        const kind = new RegExp(`\\\\b${word}\\\\b`, "g");
        const found = [...text.currentNode.data.matchAll(kind)][number];
        if (!found) continue;
        const range = document.createRange();
        range.setStart(text.currentNode, found.index);
        range.setEnd(text.currentNode, found.index + word.length);
        const { x, y, width, height } = range.getBoundingClientRect();
        return [x + width / 2, y + height / 2];
    }
}"""
BRIGHTEST = """() => {
    const canvas = document.querySelector("#dialogue .heat canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const reds = [...data].filter((_, i) => i % 4 === 0);
    return reds.indexOf(Math.max(...reds));
}"""


@pytest.fixture(scope="module")
def serving(model):
    server = Serving(model, explains=True)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(tab, serving):
    open_page(tab, serving.url)
    put_pictures(tab, PICTURE)
    ask(tab, QUESTION)
    return tab


@pytest.fixture(scope="module")
def answer(page):
    return page.locator("#dialogue .bot-row .prose").inner_text().strip()


def expected(model, answer, at):
    lab = model.lab()
    prompt = lab.prompt([{"role": "user", "content": [image(PICTURE), QUESTION]}])
    return lab.look(prompt, answer, at)


def note_of(looked):
    shares = (looked.on_pictures, looked.heat.max())
    on_pictures, most = (f"{share:.1%}".replace("%", "\u00a0%") for share in shares)
    return f"“{looked.word}”: {on_pictures}, up to {most} a place"


def note(page, word):
    locator = page.locator("#dialogue .heat span", has_text=f"“{word}")
    locator.wait_for()
    return locator.inner_text()


def test_a_click_shows_a_words_heat(page, answer, model):
    # The second of its kind is taken for itself.
    for word, number in (("triangle", 0), ("blue", 1)):
        at = [i for i in range(len(answer)) if answer.startswith(word, i)][number]
        looked = expected(model, answer, at)
        page.mouse.click(*page.evaluate(WORD, [word, number]))
        assert note(page, word) == note_of(looked)
        assert page.evaluate(BRIGHTEST) == int(looked.heat.argmax())
        assert page.evaluate("String(getSelection())") == word
        page.keyboard.press("Escape")
        wait_for_count(page, HEAT, 0)


def test_words_are_reached_by_keys(page, answer, model):
    page.locator("#dialogue .bot-row .prose").focus()
    page.evaluate("getSelection().removeAllRanges()")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    second = answer.split()[1]
    assert note(page, second) == note_of(expected(model, answer, answer.index(second)))


def test_the_heat_is_of_who_answered(browser, tmp_path):
    """The model and the system text that are chosen later change nothing, nor does a reload."""
    write_lora(tmp_path, load_config(DEMO_MODEL_DIR).language, seed=1, size=0.3)
    with MiniGPT4.load(adapters={"tuned": tmp_path}, device="cpu") as model:
        serving = Serving(model, explains=True)
        context = browser.new_context()
        context.set_default_timeout(60_000)
        try:
            page = open_page(context.new_page(), serving.url)
            put_pictures(page, PICTURE)
            choose(page, "model", "tuned")
            set_text(page, "system", "Be brief.")
            ask(page, QUESTION)
            said = page.locator("#dialogue .bot-row .prose").inner_text().strip()
            word = re.findall(r"\b[a-z]+\b", said)[-1]
            lab, question = model.lab(), {"role": "user", "content": [image(PICTURE), QUESTION]}
            asked = [{"role": "system", "content": "Be brief."}, question]
            wanted, *others = (
                each.look(lab.prompt(messages), said, said.index(word))
                for each, messages in ((lab.under("tuned"), asked), (lab, asked), (lab, [question]))
            )
            assert note_of(wanted) not in map(note_of, others)
            choose(page, "model", "demo")
            set_text(page, "system", "Say more.")
            for again in (False, True):
                if again:
                    page.reload()
                    page.wait_for_selector("#about strong")
                page.wait_for_selector("#dialogue .user-row .image-frame img")
                page.mouse.click(*page.evaluate(WORD, [word, 0]))
                assert note(page, word) == note_of(wanted)
                page.keyboard.press("Escape")
        finally:
            context.close()
            serving.close()


def test_a_new_question_takes_the_heat_away(page):
    page.mouse.click(*page.evaluate(WORD, ["triangle", 0]))
    note(page, "triangle")
    ask(page, "How many shapes are there?")
    wait_for_count(page, HEAT, 0)
    page.click("#clear")
    wait_for_count(page, "#dialogue .bot-row .prose", 0)


def test_a_words_place_is_counted_as_the_server_counts(page):
    ask(page, QUESTION)

    def show(shown, raw):
        page.evaluate(
            """([shown, raw]) => {
                document.querySelector("#dialogue .bot-row .prose").textContent = shown;
                chatHeat.keep(JSON.stringify({ turns: [{ answer: raw }] }));
            }""",
            [shown, raw],
        )

    for raw, word, number in (
        (" \n\t There are three shapes.", "three", 0),  # It is shown without the space.
        ("😀😀😀 There are three shapes.", "three", 0),  # Two units of JavaScript each.
        ("hahaha haha **haha**", "haha", 1),  # It overlaps itself.
    ):
        show(raw.replace("*", "").strip(), raw)
        page.mouse.click(*page.evaluate(WORD, [word, number]))
        asked = json.loads(page.evaluate("chatHeat.clicked()"))
        assert asked["at"] == [each.start() for each in re.finditer(rf"\b{word}\b", raw)][number]
        page.keyboard.press("Escape")
