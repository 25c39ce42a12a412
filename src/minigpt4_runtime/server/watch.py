"""The watch over the engine, which judges it only by its progress.

Owns   the judgement "ready", "not sure" and "failed", and the probe that decides between them.
Takes  the engine's counts once a second, and the errors that requests ended with.
Never  repairs a failed engine: its process ends, and its supervisor starts another. After a broken
       device or a stuck step the state of the process cannot be trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.server.failures import BROKEN, Failure
from minigpt4_runtime.server.logs import log, log_failure

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

_SECONDS_BETWEEN_LOOKS = 1.0


def engine_failed() -> Failure:
    """The error of requests whose engine has failed."""
    message = "The engine failed; the server ends and is started anew. Try again later."
    return Failure(503, message, kind=BROKEN, code="engine_failed", headers={"Retry-After": "10"})


class EngineWatch:
    """Looks at the engine while `run` runs. `on_failure` is called once, in the event loop."""

    def __init__(
        self,
        model: MiniGPT4,
        *,
        stall_seconds: float,
        is_asked: Callable[[], bool],
        on_failure: Callable[[], object],
    ) -> None:
        """`is_asked` says whether any request waits for an answer."""
        self._model = model
        self._stall_seconds = stall_seconds
        self._is_asked = is_asked
        self._on_failure = on_failure
        self._doubt = asyncio.Event()
        self._doubt.set()  # Until the first probe.
        self.trouble: str | None = "the engine has not answered yet"
        self.has_failed = False

    def report(self, error: Exception) -> None:
        """Note the error that ended a request. The request's own faults raise no doubt."""
        is_own = isinstance(error, (RequestError, ConfigError, Failure, ClientDisconnect))
        if not is_own and not self.has_failed:
            self.trouble = "a step of the engine failed"
            self._doubt.set()

    async def run(self) -> None:
        """Look, and probe where there is doubt, until the engine has failed."""
        looking = asyncio.create_task(self._look_for_stall())
        try:
            while not self.has_failed:
                await self._doubt.wait()
                self._doubt.clear()
                await self._probe()
        finally:
            looking.cancel()

    async def _probe(self) -> None:
        """Ask for one token: the engine is well if it gives it, or makes any step meanwhile."""
        steps, asking = self._model.stats().num_steps, asyncio.create_task(self._ask())
        deadline = time.monotonic() + self._stall_seconds
        while not asking.done() and self._model.stats().num_steps == steps:
            if time.monotonic() > deadline:
                break
            await asyncio.wait({asking}, timeout=0.1)
        if asking.done() and (error := asking.exception()):
            log_failure(error)
            self._fail(f"a question of its own ended with {type(error).__name__}")
        elif self._model.stats().num_steps == steps:
            self._fail(f"a question of its own had no answer for {self._stall_seconds:g} seconds")
        elif not self._doubt.is_set():
            self.trouble = None
        asking.cancel()

    async def _ask(self) -> None:
        question = [{"role": "user", "content": "?"}]
        sampling = SamplingParams(max_new_tokens=1)
        async for _ in await asyncio.to_thread(self._model.submit, question, sampling):
            pass

    async def _look_for_stall(self) -> None:
        """Doubt an engine that is asked and makes no step: its thread may be stuck, or gone."""
        steps, since = -1, time.monotonic()
        while True:
            await asyncio.sleep(min(_SECONDS_BETWEEN_LOOKS, self._stall_seconds / 4))
            now, seen = time.monotonic(), self._model.stats().num_steps
            if seen != steps or not self._is_asked():
                steps, since = seen, now
            elif now - since > self._stall_seconds:
                self.trouble = f"the engine made no step for {self._stall_seconds:g} seconds"
                self._doubt.set()
                since = now

    def _fail(self, trouble: str) -> None:
        if not self.has_failed:
            self.has_failed, self.trouble = True, trouble
            self._doubt.set()
            log("engine failed", level=logging.CRITICAL, reason=trouble)
            self._on_failure()
