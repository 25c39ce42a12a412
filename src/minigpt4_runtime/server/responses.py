"""OpenAI's responses: the same dialogues as chat completions, in another form.

Owns   the types of requests to POST /v1/responses, and of its answers and events.
Takes  replies and their pieces; gives one whole response, or the events of a stream.
Never  keeps a response: each request brings the whole dialogue.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import to_json

from minigpt4_runtime.messages import Reply, TaskName, TextDelta
from minigpt4_runtime.server.absent import RequestPart
from minigpt4_runtime.server.answered import LEFT_OUT, AnswerBox, boxes_of
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.forms import TextFormat
from minigpt4_runtime.server.protocol import (
    ChatMessage,
    ImagePart,
    ImageURL,
    TextPart,
    TextRequest,
    within,
)  # fmt: skip

# --- requests -----------------------------------------------------------------------------------


class ResponseText(RequestPart):
    """A piece of text, asked or answered before."""

    type: Literal["input_text", "output_text"]
    text: str

    @property
    def part(self) -> TextPart:
        """The same in a chat."""
        return TextPart(type="text", text=self.text)


class ResponseImage(RequestPart):
    """A picture: a data URL, or another URL that the server allows."""

    type: Literal["input_image"]
    image_url: str

    @property
    def part(self) -> ImagePart:
        """The same in a chat."""
        return ImagePart(type="image_url", image_url=ImageURL(url=self.image_url))


ResponsePart = Annotated[ResponseText | ResponseImage, Field(discriminator="type")]


class ResponseMessage(RequestPart):
    """One turn. An item of a response's output may be sent back unchanged."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ResponsePart], Field(max_length=256)]

    @property
    def message(self) -> ChatMessage:
        """The same in a chat."""
        content = self.content if isinstance(self.content, str) else [p.part for p in self.content]
        return ChatMessage(role=self.role, content=content)


class TextOptions(RequestPart):
    """The form of the text; free without a format."""

    format: TextFormat | None = None


class ResponseRequest(TextRequest):
    """The body of POST /v1/responses. Nothing is stored, whatever `store` says."""

    subject: ClassVar[str] = "input"

    input: str | Annotated[list[ResponseMessage], Field(min_length=1, max_length=1024)]
    instructions: str | None = None
    max_output_tokens: int | None = within("max_new_tokens")
    store: bool | None = None
    text: TextOptions | None = None
    task: TaskName | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _without_reasoning(cls, given: Any) -> Any:
        """Drop the reasoning items of answers that are sent back."""
        if not isinstance(given, list):
            return given
        return [
            item for item in given if not isinstance(item, dict) or item.get("type") != "reasoning"
        ]

    @property
    def forms(self) -> list[tuple[str, dict[str, Any]]]:
        """The wanted forms as SamplingParams' settings, each with the field that asks for it."""
        own = self.text.format.setting("text.format") if self.text and self.text.format else {}
        return [*super().forms, *([("text.format", own)] if own else [])]

    @property
    def dialogue(self) -> Sequence[ChatMessage]:
        """The messages of which the last is to be answered."""
        told = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*told, ChatMessage(role="user", content=self.input)]
        return [*told, *(item.message for item in self.input)]


# --- answers ------------------------------------------------------------------------------------

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """The answer's text."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """The answer. `boxes` are an extension, there if the model writes boxes."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ResponseStatus
    content: list[OutputText]
    boxes: Annotated[list[AnswerBox] | None, LEFT_OUT] = None


class IncompleteDetails(BaseModel):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class CachedTokens(BaseModel):
    """Always 0: the prefix cache is counted for all requests together, in /metrics."""

    cached_tokens: int = 0


class ReasoningTokens(BaseModel):
    """Always 0: the model does not reason."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """The usage in tokens; see `UsageCount`. Rows of pictures are input tokens."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int
    evicted_tokens: Annotated[int | None, LEFT_OUT] = None
    evicted_images: Annotated[int | None, LEFT_OUT] = None


class ResponseAnswer(BaseModel):
    """The answer to POST /v1/responses, with the request's settings, and fields never used here."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    service_tier: Literal["default"] = "default"
    store: bool = False
    temperature: float
    text: dict[str, dict[str, Any]]
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: None = None


class ResponseWriter:
    """Writes one response."""

    def __init__(
        self, asked: ResponseRequest, model_name: str, _bytes_of: Callable[[int], bytes]
    ) -> None:
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._num_events = 0
        self._text = ""
        form = (asked.text and asked.text.format) or TextFormat(type="text", schema=None)
        self._blank = ResponseAnswer(
            id=f"resp_{secrets.token_hex(12)}", created_at=int(time.time()), status="in_progress",
            model=model_name, output=[], instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens or asked.max_tokens,
            temperature=asked.temperature or 0.0, top_p=asked.top_p or 1.0,
            text={"format": form.model_dump(by_alias=True, exclude_none=True)},
        )  # fmt: skip

    def whole(self, replies: Sequence[Reply]) -> ResponseAnswer:
        """The response, whole."""
        (reply,) = replies
        usage = reply.usage
        is_cut = reply.finish_reason == "length"
        status: ResponseStatus = "incomplete" if is_cut else "completed"
        return self._blank.model_copy(
            update={
                "status": status,
                "output": [self._message(reply.text, status, boxes_of(reply))],
                "incomplete_details": IncompleteDetails() if is_cut else None,
                "usage": ResponseUsage(
                    input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens,
                    total_tokens=usage.prompt_tokens + usage.completion_tokens,
                    evicted_tokens=usage.evicted_tokens or None,
                    evicted_images=usage.evicted_images or None,
                ),
            }
        )  # fmt: skip

    def start(self) -> bytes:
        """The events before any text."""
        return (
            self._event("response.created", response=self._blank)
            + self._event("response.in_progress", response=self._blank)
            + self._event(
                "response.output_item.added",
                output_index=0,
                item=self._message(None, "in_progress"),
            )
            + self._part_event("response.content_part.added", part=OutputText(text=""))
        )

    def piece(self, _index: int, delta: TextDelta) -> bytes:
        """The event of a further piece."""
        if not delta.text:
            return b""
        self._text += delta.text
        return self._part_event("response.output_text.delta", delta=delta.text, logprobs=[])

    def end(self, replies: Sequence[Reply]) -> bytes:
        """The events that repeat the whole: as a text, a part, a message and a response."""
        response = self.whole(replies)
        (message,) = response.output
        (part,) = message.content
        return (
            self._part_event("response.output_text.done", text=part.text, logprobs=[])
            + self._part_event("response.content_part.done", part=part)
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(f"response.{response.status}", response=response)
        )

    def failed(self, failure: Failure) -> bytes:
        """The failed response, and an event that clients raise as an error."""
        error = ResponseFailure(code=failure.code or failure.kind, message=failure.message)
        output = [self._message(self._text, "incomplete")]
        update = {"status": "failed", "error": error, "output": output}
        told = {"code": failure.code, "message": failure.message, "param": failure.param}
        return self._event(
            "response.failed", response=self._blank.model_copy(update=update)
        ) + self._event("error", **told, **failure.as_body())

    def _message(
        self, text: str | None, status: ResponseStatus, boxes: list[AnswerBox] | None = None
    ) -> OutputMessage:
        content = [] if text is None else [OutputText(text=text)]
        return OutputMessage(id=self._message_id, status=status, content=content, boxes=boxes)

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(
            kind, item_id=self._message_id, output_index=0, content_index=0, **fields
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), to_json(event))
