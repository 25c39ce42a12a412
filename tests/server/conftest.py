"""Servers, with the demo model behind them."""

import contextlib

import pytest
from running import IMAGES, running

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.images.pixels import ImageLimits


@pytest.fixture(scope="session")
def model(tls_once):
    with MiniGPT4.load(image_limits=ImageLimits(max_pixels=1_000_000)) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def server(model):
    """One for all tests that need nothing special."""
    with running(model, media_dir=IMAGES) as started:
        yield started


@pytest.fixture
def start(model):
    """Starts servers with settings of their own: `start(max_requests=1)`."""
    with contextlib.ExitStack() as stack:
        yield lambda given=model, **settings: stack.enter_context(running(given, **settings))
