"""What a person does on the page, each step waiting for what it is to show."""

import time

ANSWERS = "#dialogue .bot-row .prose"
QUESTIONS = "#dialogue .user-row .prose"
PICTURES_ASKED = "#dialogue .user-row img"
BOX = "#question textarea"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def open_page(browser, serving, *, width=1200, height=850, **options):
    """A page in a browser of its own, with nothing in its storage."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(serving.url)
    # What is said of the model comes last, after a dialogue that was kept.
    page.wait_for_selector("#about strong")
    return page


def put_pictures(page, *pictures):
    page.set_input_files("#question input[type=file]", pictures)
    wait_for_count(page, "#question img", len(pictures))


def ask(page, question):
    """Ask, and wait until the answer has ended."""
    begin(page, question)
    page.wait_for_selector("#stop:disabled")


def begin(page, question):
    """Ask, and wait until the question was taken over: from then on Stop can be pressed."""
    page.fill(BOX, question)
    page.press(BOX, "Enter")
    page.wait_for_function(f"document.querySelector('{BOX}').value === ''")


def retry(page):
    page.click("#retry")
    page.wait_for_selector("#stop:enabled")
    page.wait_for_selector("#stop:disabled")


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def wait_for_count(page, selector, count):
    page.wait_for_function(
        "([selector, count]) => document.querySelectorAll(selector).length === count",
        arg=[selector, count],
    )


def set_number(page, name, value):
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def set_text(page, name, value):
    box = page.locator(f"#{name} textarea, #{name} input")
    box.fill(value)
    box.press("Tab")
