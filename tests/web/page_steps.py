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


def open_page(page, url, *, width=1200, height=850, colour="light"):
    """The page as it comes to a browser that has kept nothing of it but its scripts."""
    page.goto("about:blank")  # No page is left that could still write.
    storage = page.context.new_cdp_session(page)
    storage.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    storage.detach()
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=colour)
    page.goto(url)
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


def retry(page, serving):
    with serving.slowly():
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


def choose(page, name, choice):
    page.click(f"#{name} input")
    page.click(f"#{name} [role=option]:has-text('{choice}')")
