"""The values that callers and rooms pass to each other: messages in, replies out.

Owns   Message, ImageSource, Reply, TextDelta, their parts, and the reading of OpenAI-style dicts.
Takes  plain Python values; an image stays as the caller gave it until `pixels.load` opens it.
Never  opens an image, and knows no template and no token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

from minigpt4_runtime.errors import RequestError

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL.Image import Image

    # The types in which a caller may give an image.
    RawImage = str | PathLike[str] | bytes | Image | numpy.ndarray[Any, Any] | torch.Tensor

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
# What MiniGPT-v2 was taught to do when a question begins with this word in brackets.
TaskName = Literal["vqa", "caption", "grounding", "refer", "identify", "detection"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
DATA_URL_NAME = "the picture given as a data URL"


@dataclass(frozen=True, eq=False)
class ImageSource:
    """An image not yet opened: a path, bytes, a data URL, a PIL image, an array or a tensor.

    Or a function that gives its bytes when it is opened; `label` is then its name for people.
    """

    value: RawImage | Callable[[], bytes]
    label: str | None = None

    @property
    def name(self) -> str:
        """The name of this image in messages to people."""
        if self.label is not None:
            return self.label
        if isinstance(self.value, str):
            if self.value[:5].lower() == "data:":
                return DATA_URL_NAME
            return self.value if len(self.value) <= 200 else f"{self.value[:40]}…"
        if isinstance(self.value, PathLike):
            return str(self.value)
        return f"the picture given as {type(self.value).__name__}"


if TYPE_CHECKING:
    ImageLike = ImageSource | RawImage


def image(value: ImageLike) -> ImageSource:
    """Mark a value as an image inside a message's content: `[image("cat.jpg"), "What is it?"]`."""
    return value if isinstance(value, ImageSource) else ImageSource(value)


ContentPart = str | ImageSource


@dataclass(frozen=True)
class Message:
    """One turn: its speaker, and its texts and images in order.

    The `task` of a user's turn is for models that know tasks, such as MiniGPT-v2. An assistant's
    turn without content is a reply that is not told to the model.
    """

    role: Role
    content: tuple[ContentPart, ...]
    task: TaskName | None = None

    def __post_init__(self) -> None:
        """Check role and content; content may be given as one part, or as OpenAI-style parts."""
        if self.role not in get_args(Role):
            raise RequestError(
                f"role is {self.role!r}; it must be one of {', '.join(get_args(Role))}."
            )
        object.__setattr__(self, "content", _read_content(self.content))
        if self.role != "user" and any(isinstance(part, ImageSource) for part in self.content):
            raise RequestError(
                f"A picture stands in a message of role {self.role!r}; only 'user' messages may "
                "hold pictures."
            )
        if self.task is not None and (self.task not in TASK_NAMES or self.role != "user"):
            raise RequestError(
                f"task is {self.task!r:.80} in a message of role {self.role!r}; a user's message "
                f"may have {', '.join(TASK_NAMES)}."
            )
        for part in self.content:
            # Half characters: undecodable bytes of a terminal become such.
            if isinstance(part, str) and re.search(r"[\ud800-\udfff]", part):
                raise RequestError(f"{part[:40]!r} is not valid Unicode text. Send it as UTF-8.")

    @classmethod
    def read(cls, value: Message | Mapping[str, Any]) -> Message:
        """Take a Message or an OpenAI-style dict.

        Raises:
            RequestError: the dict has another form; the message says which part and what is wanted.
        """
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(
                f"A message is a dict with 'role' and 'content', not {type(value).__name__}."
            )
        if set(value) - {"task"} != {"role", "content"}:
            raise RequestError(
                "A message has the keys 'role' and 'content', and may have 'task'; this one has "
                f"{sorted(map(str, value))}."
            )
        return cls(value["role"], value["content"], value.get("task"))


def read_messages(values: Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """Check a dialogue. Its last message is a user's, or the assistant's, which is then continued.

    System messages may stand anywhere.

    Raises:
        RequestError: no user has said anything.
    """
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise RequestError(
            "messages must be a list of messages, for example "
            '[{"role": "user", "content": [image("cat.jpg"), "What is this?"]}].'
        )
    messages = tuple(Message.read(value) for value in values)
    if not any(message.role == "user" for message in messages):
        raise RequestError("There is no message of role 'user': it is what gets answered.")
    return messages


def _read_content(content: object) -> tuple[ContentPart, ...]:
    if isinstance(content, (str, ImageSource)):
        return (content,)
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return tuple(_read_part(part) for part in content)
    raise RequestError(
        f"content must be a string or a list of parts, not {type(content).__name__}. "
        "Mark a picture with image(...)."
    )


def _read_part(part: object) -> ContentPart:
    if isinstance(part, (str, ImageSource)):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if isinstance(url, str):
                return ImageSource(url)
    raise RequestError(
        "A part of content is a string, image(...), {'type': 'text', 'text': …} or "
        f"{{'type': 'image_url', 'image_url': {{'url': …}}}}; seen: {str(part)[:80]}."
    )


@dataclass(frozen=True)
class Usage:
    """The size of a request in tokens. Image rows count as prompt tokens.

    With a `cache_window`, about `evicted_tokens` tokens, and `evicted_images` images among them,
    had left the window when the last token was chosen. `prompt_tokens` are those of the prompt that
    had not left it at first.
    """

    prompt_tokens: int
    completion_tokens: int
    evicted_tokens: int = 0
    evicted_images: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token before any sampling setting, as a natural logarithm.

    `top` are the likeliest ids with theirs, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Box:
    """A part of a picture that an answer points at, and its label, if the answer names it.

    `box` is (left, top, right, bottom) in pixels of the upright picture. In the answer's text it is
    written from `start` to `stop`.
    """

    label: str | None
    box: tuple[int, int, int, int]
    start: int
    stop: int


@dataclass(frozen=True)
class Reply:
    """A finished answer. `token_ids` are all ids the model gave, the stop itself included.

    `logprobs` has an entry for each of them if SamplingParams.logprobs asked for it. `boxes` are
    those in the text, for a model that was taught to write them: parts of the last picture before
    the answer, whose width and height are `picture_size`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] | None = None
    boxes: tuple[Box, ...] = ()
    picture_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class TextDelta:
    """A further bit of an answer. The last one of a stream also carries the finished `reply`.

    `logprobs`, if asked for, are those of all tokens since the bit before, and `usage` counts all
    tokens up to here.
    """

    text: str
    reply: Reply | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Described:
    """The result for one of many images; `reply` or `error` is None.

    `index` counts the images in their given order; `seconds` start when the image is opened.
    """

    index: int
    reply: Reply | None
    error: RequestError | None
    seconds: float
