"""A conversation as vLLM has parsed it → our messages.

Owns   the reading of its parts, and the order of its pictures.
Takes  messages in OpenAI's form, in which vLLM has put a mark in place of each picture.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4_runtime.messages import ImageSource, Message


def read_conversation(
    conversation: Sequence[Mapping[str, Any]],
) -> tuple[list[ImageSource], list[Message]]:
    """The pictures in the order of the messages, and the messages, with a mark for each picture.

    Raises:
        RequestError: a message has a role or a part that the model was not taught.
    """
    sources: list[ImageSource] = []

    def read(part: Any) -> Any:
        if isinstance(part, Mapping) and part.get("type") == "image":
            sources.append(ImageSource(b""))
            return sources[-1]
        return part

    dialogue = []
    for message in conversation:
        content = message.get("content")
        content = () if content is None else content
        parts = (content,) if isinstance(content, str) else tuple(map(read, content))
        dialogue.append(Message(message["role"], parts))
    return sources, dialogue
