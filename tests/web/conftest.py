"""Servers with a chat page, and a browser."""

import shutil

import pytest
from page_server import KEY, Serving
from page_steps import open_page

from minigpt4_runtime import MiniGPT4

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Nothing may be fetched from elsewhere, and nothing runs that would try.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="session")
def model(tls_once):
    with MiniGPT4.load(device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def serving(model):
    server = Serving(model)
    yield server
    server.close()


@pytest.fixture(scope="module")
def guarded(model):
    server = Serving(model, keys=(KEY,))
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


@pytest.fixture(scope="module")
def tab(serving, browser):
    """One for all tests of a file: to a browser that knows the page's scripts it comes quickly.

    It is closed before the server, which would wait for it.
    """
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab, serving):
    return open_page(tab, serving.url)
