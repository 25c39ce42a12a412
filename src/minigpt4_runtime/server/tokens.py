"""POST /tokenize, as vLLM has it: the ids that a prompt or a dialogue would have.

Owns   the types of request and answer. Takes a checked request; gives ids. Never opens an image:
       each takes as many ids as the model has rows for it, all equal to the vocabulary's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, Field, model_validator

from minigpt4_runtime.messages import Message, image
from minigpt4_runtime.server.absent import RequestPart
from minigpt4_runtime.server.protocol import ChatMessage, TextPart

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4


class TokenizeRequest(RequestPart):
    """The body of POST /tokenize: one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1024)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _has_one_subject(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Tokenized(BaseModel):
    """The ids, how many they are, and how many the model's context holds."""

    count: int
    max_model_len: int
    tokens: list[int]


def tokenize(model: MiniGPT4, asked: TokenizeRequest) -> Tokenized:
    """Give the ids.

    Raises:
        RequestError: it is not a dialogue.
    """
    if asked.prompt is None:
        messages = [_read(message) for message in asked.messages or ()]
        ids = model.encode_prompt(messages).token_ids
    else:
        ids = model.encode_text(asked.prompt)
        ids = ids[1:] if asked.add_special_tokens is False else ids
    most = model.config.language.context_length
    return Tokenized(count=len(ids), max_model_len=most, tokens=list(ids))


def _read(message: ChatMessage) -> Message:
    parts = [
        part.text if isinstance(part, TextPart) else image(part.image_url.url)
        for part in message.parts
    ]
    return Message(message.speaker, tuple(parts))
