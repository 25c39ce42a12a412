"""A dialogue about images, as the page keeps it, and its answers from a server.

Owns   the turns, their form in the API, and the wording of errors on the page.
Takes  an address and turns; gives the last turn's answer as it grows.
Never  knows Gradio, nor the engine: it speaks HTTP through OpenAI's own client.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.optional import require

openai = require("openai", extra="web")

# An answer may take long to begin: pictures are encoded first, and others wait as well.
_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Turn:
    """A question, its images, and the answer so far, if there is any.

    The answer was asked of `model` under the text `system`, as the controls were then.
    """

    question: str
    images: tuple[Path, ...] = ()
    answer: str = ""
    model: str = field(default="", compare=False)
    system: str = field(default="", compare=False)


@dataclass(frozen=True)
class AnswerSettings:
    """The values of the controls beside the dialogue. No `model` is the server's first."""

    model: str = ""
    system: str = ""
    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int = SamplingParams.top_k
    num_beams: int = SamplingParams.num_beams
    repetition_penalty: float = SamplingParams.repetition_penalty
    max_tokens: int = SamplingParams.max_new_tokens
    seed: int | None = SamplingParams.seed

    def as_fields(self) -> dict[str, Any]:
        """These settings as arguments of the OpenAI client.

        Without a seed the server draws one. Extensions of the API are sent only if they are used,
        as another server may not know them.
        """
        asked: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens,
        }  # fmt: skip
        if self.seed is not None:
            asked["seed"] = self.seed
        default = {each.name: each.default for each in fields(self)}
        extra = {
            name: getattr(self, name)
            for name in ("top_k", "num_beams", "repetition_penalty")
            if getattr(self, name) != default[name]
        }
        return {**asked, "extra_body": extra}


@dataclass(frozen=True)
class Card:
    """The model that answers. Only this project's server says more than its name.

    `names` are all that the server answers by: the model's own first, then those of its adapters.
    """

    name: str
    names: tuple[str, ...] = ()
    description: str = ""
    tasks: tuple[str, ...] = ()
    explains: bool = False


class DialogueError(Exception):
    """A failure, in one sentence for the page."""


@dataclass(frozen=True)
class Server:
    """Where answers come from. `url` is that of the server, without /v1."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    async def model(self) -> Card:
        """The model that answers.

        Raises:
            DialogueError: the server does not answer.
        """
        async with self._client() as client:
            try:
                models = await client.models.list()
            except openai.OpenAIError as error:
                raise DialogueError(self._explain(error)) from None
        card = models.data[0]
        return Card(
            card.id, tuple(each.id for each in models.data), str(getattr(card, "description", "")),
            tuple(getattr(card, "tasks", ())), explains=getattr(card, "explains", False) is True,
        )  # fmt: skip

    async def answer(self, turns: Sequence[Turn], settings: AnswerSettings) -> AsyncGenerator[str]:
        """The answer to the last turn's question, as it grows. Leaving it early cancels it.

        Raises:
            DialogueError: the server refuses or cannot be reached, or an image is gone.
        """
        messages = as_messages(turns, settings.system)
        async with self._client() as client:
            try:
                stream = await client.chat.completions.create(
                    model=settings.model or (await client.models.list()).data[0].id,
                    messages=messages,
                    stream=True,
                    **settings.as_fields(),
                )
                answer = ""
                async with stream:
                    async for chunk in stream:
                        for choice in chunk.choices:
                            answer += choice.delta.content or ""
                            yield answer
            except openai.OpenAIError as error:
                raise DialogueError(self._explain(error)) from None

    async def look(self, turns: Sequence[Turn], at: int) -> dict[str, Any]:
        """Where the word at a character of the last turn's answer looked: see POST /explain.

        Raises:
            DialogueError: the server refuses or cannot be reached, or an image is gone.
        """
        *before, last = turns
        body = {
            "messages": as_messages([*before, replace(last, answer="")], last.system),
            "answer": last.answer, "at": at, **({"model": last.model} if last.model else {}),
        }  # fmt: skip
        async with self._client() as client:
            try:
                answered = await client.post(f"{self.url}/explain", body=body, cast_to=object)
            except openai.OpenAIError as error:
                raise DialogueError(self._explain(error)) from None
        return dict(answered)

    def _client(self) -> Any:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            # The client requires one; a server without keys ignores it.
            api_key=self.api_key or "none",
            timeout=_TIMEOUT_SECONDS,
            max_retries=0,
        )

    def _explain(self, error: Exception) -> str:
        if isinstance(error, openai.APITimeoutError):
            return f"The server at {self.url} took too long. Try again."
        if isinstance(error, openai.APIConnectionError):
            return f"There is no server at {self.url}. Is it running?"
        body = getattr(error, "body", None)
        if isinstance(body, dict) and body.get("message"):
            return str(body["message"])
        return str(error)


def as_messages(turns: Sequence[Turn], system: str = "") -> list[dict[str, Any]]:
    """Turns as the API takes them: images as data URLs. The last answer is still to come.

    Raises:
        DialogueError: an image is gone.
    """
    messages: list[dict[str, Any]] = []
    if system.strip():
        messages.append({"role": "system", "content": system.strip()})
    for turn in turns:
        text = {"type": "text", "text": turn.question}
        images = [_as_part(image) for image in turn.images]
        messages.append({"role": "user", "content": [*images, text]})
        if turn.answer and turn is not turns[-1]:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _as_part(image: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(image)[0] or "image/png"
    try:
        data = base64.b64encode(image.read_bytes()).decode("ascii")
    except OSError:
        raise DialogueError(
            "A picture of this dialogue is not kept any more. Clear it and upload the picture."
        ) from None
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
