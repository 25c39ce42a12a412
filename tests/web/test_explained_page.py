"""The page of an explanation in a browser: words, places and maps, by pointer and by keys."""

from pathlib import Path

import pytest

from minigpt4_runtime import image

PICTURE = Path(__file__).parents[2] / "examples/images/three.png"


@pytest.fixture(scope="module")
def explanation(model):
    lab = model.lab()
    content = [image(PICTURE), "Describe this image in detail."]
    return lab.explain(lab.prompt([{"role": "user", "content": content}]))


@pytest.fixture(scope="module")
def page(explanation, browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(explanation.as_page(), encoding="utf-8")
    context = browser.new_context(viewport={"width": 360, "height": 800})
    tab = context.new_page()
    tab.faults = []
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("console", lambda said: tab.faults.append(said.text))
    tab.goto(path.as_uri())
    yield tab
    assert tab.faults == []
    context.close()


def test_a_word_shows_its_heat(page, explanation):
    words = [word.text for word in explanation.words]
    assert page.locator("#words button").all_inner_texts() == words
    at = words.index("triangle")
    page.locator("#words button").nth(at).click()
    assert page.locator("#words [aria-pressed=true]").inner_text() == "triangle"
    heat = explanation.heat_of(explanation.words[at])[0, 0]
    assert page.locator("#most").inner_text() == f"{heat.max():.1%}".replace("%", "\u00a0%")
    # The brightest place of the drawn heat is that of the numbers.
    drawn = page.evaluate("""() => {
        const canvas = document.querySelector("#pictures canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const reds = [...data].filter((_, i) => i % 4 === 0);
        return [canvas.height, canvas.width, reds.indexOf(Math.max(...reds))];
    }""")
    assert drawn == [*heat.shape, int(heat.argmax())]
    page.keyboard.press("ArrowRight")
    assert page.locator("#words [aria-pressed=true]").inner_text() == words[at + 1]
    assert page.locator("#details dd").first.inner_text() == words[at + 1]


def test_places_and_cells_are_read_out(page, explanation):
    page.locator("#words button").first.click()
    page.locator("#pictures .stack").focus()
    page.keyboard.press("ArrowDown")
    share = float(explanation.heat_of(explanation.words[0])[0, 0, 1, 0])
    said = page.locator("#cell").inner_text()
    assert said.startswith("row 2, column 1: ")
    assert abs(float(said.split(": ")[1].rstrip("\u00a0%").lstrip("<\u00a0")) / 100 - share) < 1e-3
    page.locator("#tokens-map svg").focus()
    page.keyboard.press("ArrowRight")
    token, read = explanation.pieces[0].said.text, explanation.columns[1]
    assert (
        page.locator("#tokens-map .readout").inner_text().startswith(f"“{token}” read “{read}”: ")
    )
    page.locator("#heads-map svg").hover(position={"x": 60, "y": 25})
    assert page.locator("#heads-map .readout").inner_text().startswith("layer 0, head 0: ")


def test_nothing_is_wider_than_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 360
