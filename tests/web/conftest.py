"""Servers with a chat page, and a browser."""

import shutil

import pytest
from page_server import KEY, Serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Nothing may be fetched from elsewhere, and nothing runs that would try.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def serving():
    server = Serving()
    yield server
    server.close()


@pytest.fixture(scope="module")
def guarded():
    server = Serving(keys=(KEY,))
    yield server
    server.close()


# For one file only: as long as it is open, no test can run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, serving):
    page = browser.new_page(viewport={"width": 1200, "height": 850})
    page.set_default_timeout(60_000)
    page.goto(serving.url)
    # What is said of the model comes last.
    page.wait_for_selector("#about strong")
    yield page
    page.close()
