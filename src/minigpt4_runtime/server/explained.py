"""POST /explain: where a word of an answer looked, for the chat page and others.

Owns   the types of request and answer, and the one thread in which answers are looked into.
Takes  a checked request and its opened messages; gives shares of attention on their pictures.
Never  touches what the engine computes with: it has the model's laboratory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from minigpt4_runtime.messages import Message
from minigpt4_runtime.server.absent import RequestPart
from minigpt4_runtime.server.protocol import ChatMessage

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4


class ExplainRequest(RequestPart):
    """The body of POST /explain: a dialogue, its next answer, and a character of that.

    `at` counts characters (code points) of the answer as it is sent.
    """

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    answer: str = Field(min_length=1)
    at: int = Field(ge=0)


class Explained(BaseModel):
    """The word at that character: where it stands, and where it looked.

    `heat` has for each picture the rows of its patches, shares of attention, mean over layers and
    heads; `on_pictures` is the share on all rows of pictures.
    """

    word: str
    start: int
    stop: int
    on_pictures: float
    heat: list[list[list[float]]]


class Explainer:
    """Looks into answers, one at a time; others wait."""

    def __init__(self, model: MiniGPT4) -> None:
        """Raises a RequestError where several ranks share the model."""
        lab = model.lab()
        self._lab_of = cache(lambda adapter: lab.under(adapter) if adapter else lab)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explaining")

    async def explain(
        self, messages: Sequence[Message], asked: ExplainRequest, adapter: str | None
    ) -> Explained:
        """Look where the word looked. What still waits for its turn can be cancelled.

        Raises:
            MiniGPT4Error: it is no dialogue, a picture cannot be read, or there is no such word.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._explain, messages, asked, adapter)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _explain(
        self, messages: Sequence[Message], asked: ExplainRequest, adapter: str | None
    ) -> Explained:
        lab = self._lab_of(adapter)
        looked = lab.look(lab.prompt(messages), asked.answer, asked.at)
        heat = looked.heat.astype(float).round(6).tolist()
        return Explained(
            word=looked.word, start=looked.start, stop=looked.stop,
            on_pictures=round(looked.on_pictures, 6), heat=heat,
        )  # fmt: skip
