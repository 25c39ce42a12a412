"""A real server with the chat page, which can be slowed down so that answers are seen to grow."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path

from minigpt4_runtime.server import listen
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig
from minigpt4_runtime.web.dialogue import Server
from minigpt4_runtime.web.page import build_page, mount

PICTURES = Path(__file__).parents[2] / "examples/images"
KEY = "a key of more than sixteen".replace(" ", "-")
SLOW_STEP_SECONDS = 0.25


class Serving:
    """A server in a thread of this process."""

    def __init__(self, model, *, keys=(), **settings):
        self.model = model
        listener = listen.bind("127.0.0.1", 0)
        self.url = listen.url_of(listener)
        app = create_app(
            self.model,
            ServerConfig(
                model_name="demo",
                model_description="It knows only drawn scenes.",
                api_keys=keys,
                **settings,
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
        engine = self.model._loaded.engine
        step = engine.step
        engine.step = lambda: (time.sleep(SLOW_STEP_SECONDS), step())
        try:
            yield
        finally:
            del engine.step

    def close(self):
        # What a page still listens to would be waited for.
        self._server.config.timeout_graceful_shutdown = 0
        self._server.should_exit = True
        self._thread.join()
