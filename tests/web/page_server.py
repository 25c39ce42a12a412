"""A real server with the chat page, slowed down so that answers can be seen to grow."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.server import listen
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig
from minigpt4_runtime.web.dialogue import Server
from minigpt4_runtime.web.page import build_page, mount

PICTURES = Path(__file__).parents[2] / "examples/images"
KEY = "a key of more than sixteen".replace(" ", "-")
STEP_SECONDS = 0.05
SLOW_STEP_SECONDS = 0.5


class Serving:
    """A server in a thread of this process; `model` is its model."""

    def __init__(self, *, keys=()):
        self.model = MiniGPT4.load(device="cpu")
        step = self.model._loaded.engine.step
        self._step_seconds = STEP_SECONDS
        self.model._loaded.engine.step = lambda: (time.sleep(self._step_seconds), step())
        listener = listen.bind("127.0.0.1", 0)
        self.url = listen.url_of(listener)
        app = create_app(
            self.model,
            ServerConfig(
                model_name="demo", model_description="It knows only drawn scenes.", api_keys=keys
            ),
            asks_browsers=True,
        )
        pictures = sorted(PICTURES.glob("*.png"))
        server = Server(self.url, keys[0] if keys else None)
        self.failures = []
        self._server = listen.HttpServer(app)

        async def serve():
            # Where no event loop runs Gradio makes some, and closes none.
            mount(app, build_page(server, pictures), on_failure=self.failures.append)
            await self._server.serve(sockets=[listener])

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the page could not be made"
            time.sleep(0.01)

    @contextlib.contextmanager
    def slowly(self):
        """Let answers grow so slowly that a browser on a busy machine is there before they end."""
        self._step_seconds = SLOW_STEP_SECONDS
        try:
            yield
        finally:
            self._step_seconds = STEP_SECONDS

    def close(self):
        self._server.should_exit = True
        self._thread.join()
        self.model.close()
