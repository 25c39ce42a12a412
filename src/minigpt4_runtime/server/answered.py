"""The types of answers: chat completions in OpenAI's form, models, states and errors.

Owns   the names of all fields in these answers. Takes values; gives JSON. Never reads a request.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from minigpt4_runtime.messages import FinishReason, Reply, TaskName


class TopLogprob(BaseModel):
    """One token that could have stood there. `bytes` are UTF-8, `token` may be half a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """A log-probability for every token, the one that ended the answer included."""

    content: list[TokenLogprob]


LEFT_OUT = Field(exclude_if=lambda value: value is None)


class AnswerBox(BaseModel):
    """A part of the picture: left, top, right, bottom in pixels; and its place in the content."""

    label: str | None
    box: tuple[int, int, int, int]
    start: int
    stop: int


def boxes_of(reply: Reply) -> list[AnswerBox] | None:
    """The boxes of an answer; None from a model that writes none."""
    if reply.picture_size is None:
        return None
    return [AnswerBox(**vars(box)) for box in reply.boxes]


class AnswerMessage(BaseModel):
    """The answer's text. `boxes` are an extension, there if the model writes boxes."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    boxes: Annotated[list[AnswerBox] | None, LEFT_OUT] = None


class Choice(BaseModel):
    """One answer of n."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class UsageCount(BaseModel):
    """The usage in tokens; the prompt counts once. Rows of pictures are prompt tokens.

    The last two are an extension, there where something has left the window (`--cache-window`).
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    evicted_tokens: Annotated[int | None, LEFT_OUT] = None
    evicted_images: Annotated[int | None, LEFT_OUT] = None


class ChatCompletion(BaseModel):
    """The answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageCount


class Delta(BaseModel):
    """The new text. The role stands in a choice's first piece only, boxes in its last."""

    role: Annotated[Literal["assistant"] | None, LEFT_OUT] = None
    content: Annotated[str | None, LEFT_OUT] = None
    boxes: Annotated[list[AnswerBox] | None, LEFT_OUT] = None


class ChunkChoice(BaseModel):
    """A further piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a stream. With include_usage a last one has the usage and no choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageCount | None = None


class ModelCard(BaseModel):
    """A model of this server. An adapter has the model that it is used with as `parent`.

    Extensions: its abilities in words, the tasks it knows, and whether there is POST /explain.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["minigpt4-runtime"] = "minigpt4-runtime"
    parent: str | None = None
    description: str
    tasks: tuple[TaskName, ...] = ()
    explains: bool = False


class ModelList(BaseModel):
    """All models of this server: its own, and the adapters of that."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    """The version of this server."""

    version: str


class ErrorContent(BaseModel):
    """An error; `param` names the field to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorContent


class Status(BaseModel):
    """Whether the server is alive, or ready; if it is not, why."""

    status: Literal["alive", "ready", "not ready"]
    reason: str | None = None
