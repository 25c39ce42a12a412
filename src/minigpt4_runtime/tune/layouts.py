"""The files in which dialogues about pictures are published, and the messages of their entries.

Owns   three layouts: our .jsonl of messages, LLaVA's JSON, and the original's filter_cap.json.
Takes  a path; gives entries, each with its place for people, whose messages are read one by one.
Never  opens a picture.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

CAPTIONS_NAME = "filter_cap.json"
_MESSAGE_KEYS = {"messages", "id"}
# What the original asks about a captioned picture (upstream: prompts/alignment.txt).
_CAPTION_PROMPTS = (
    DESCRIBE_PROMPT,
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
# LLaVA's names of speakers, and its mark for the picture (upstream: docs/Finetune_Custom_Data.md).
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
_MARK = "<image>"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One dialogue. `read` gives its messages, or raises a RequestError."""

    place: str
    read: Callable[[], Messages]


@dataclass(frozen=True)
class Records:
    """The entries of a file, its sha256, and the folder from which paths of pictures count."""

    entries: tuple[Entry, ...]
    digest: str
    folder: Path


def open_records(path: Path) -> Records:
    """The entries of a .jsonl, of LLaVA's .json, or of a folder with filter_cap.json.

    Raises:
        ConfigError: it cannot be read, or is none of these.
    """
    file = path / CAPTIONS_NAME if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from None
    folder = file.parent
    if file.name == CAPTIONS_NAME:
        entries, folder = _caption_entries(_parse_whole(file, content)), folder / "image"
    elif file.suffix.lower() == ".json":
        entries = _llava_entries(file, _parse_whole(file, content))
    else:
        entries = [
            Entry(f"line {number}", partial(_line_messages, line))
            for number, line in enumerate(content.splitlines(), start=1)
            if line.strip()
        ]
    if not entries:
        raise ConfigError(f"{file} is empty: it must hold at least one dialogue.")
    return Records(tuple(entries), hashlib.sha256(content).hexdigest(), folder)


def _parse_whole(file: Path, content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no JSON ({str(error)[:80]}).") from None


def _line_messages(line: bytes) -> Messages:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"It is not UTF-8 text ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"It is no JSON ({str(error)[:80]}).") from None
    if not isinstance(record, dict) or "messages" not in record or record.keys() - _MESSAGE_KEYS:
        seen = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise RequestError(f'It must be {{"messages": […]}}; seen: {str(seen)[:80]}.')
    return record["messages"]  # type: ignore[no-any-return]


def _caption_entries(content: object) -> list[Entry]:
    notes = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(notes, list):
        raise ConfigError(
            f'{CAPTIONS_NAME} must be {{"annotations": […]}}, as the original has it.'
        )
    return [
        Entry(f"annotation {number}", partial(_caption, number, note))
        for number, note in enumerate(notes, start=1)
    ]


def _caption(number: int, note: object) -> Messages:
    """The original draws a prompt at random; here they come in turn."""
    name, text = _field(note, "image_id"), _field(note, "caption")
    prompt = _CAPTION_PROMPTS[(number - 1) % len(_CAPTION_PROMPTS)]
    return [_about(f"{name}.jpg", prompt), {"role": "assistant", "content": text}]


def _llava_entries(file: Path, content: object) -> list[Entry]:
    if not isinstance(content, list):
        raise ConfigError(f"{file} holds no list; LLaVA's JSON is [{{image, conversations}}, …].")
    return [
        Entry(f"entry {number}", partial(_conversation, item))
        for number, item in enumerate(content, start=1)
    ]


def _conversation(item: object) -> Messages:
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list):
        raise RequestError("It must have a list of conversations, as LLaVA's JSON has it.")
    messages = []
    for turn in turns:
        speaker, text = _field(turn, "from"), _field(turn, "value")
        if speaker not in _SPEAKERS:
            raise RequestError(f"from is {speaker!r:.40}; it must be human, gpt or system.")
        if _MARK in text and _SPEAKERS[speaker] != "user":
            raise RequestError(f"A turn from {speaker} has {_MARK}: only a human shows a picture.")
        if _MARK in text:
            words = text.replace(_MARK, "", 1).strip()
            if _MARK in words:
                raise RequestError(f"A turn has several {_MARK}, and an entry has one picture.")
            messages.append(_about(_field(item, "image"), words))
        else:
            messages.append({"role": _SPEAKERS[speaker], "content": text})
    return messages


def _about(picture: str, text: str) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": {"url": picture}}
    return {"role": "user", "content": [shown, *([text] if text else [])]}


def _field(value: object, name: str) -> str:
    """A text, or a number as upstream also has them for image_id."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise RequestError(f"{name} must be a text; seen: {str(found)[:40]}.")
    return str(found)
