"""Training data: a .jsonl of dialogues, checked whole before anything is trained.

Owns   the form of a line, and the ids that the model reads and learns.
Takes  the file, and a model folder for its tokenizer, template and sizes; gives TuningData.
Never  lets a bad line pass: every one is named, with its number.

A line is `{"messages": [{"role": "user", "content": […]}, {"role": "assistant", "content": "…"}]}`,
messages as `MiniGPT4.chat` takes them. A path of a picture is relative to the file's folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError, MiniGPT4Error, RequestError
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.messages import ImageSource, Message, read_messages
from minigpt4_runtime.text.prompt import Template, find_template, render
from minigpt4_runtime.text.tokenizer import Tokenizer

_MOST_FAULTS_SHOWN = 20
_KEYS = {"messages", "id"}


@dataclass(frozen=True)
class Example:
    """One answer, and all that stands before it.

    `prompt_ids` has rows of pictures from each of `places` on, whose pictures are `pictures`, as
    numbers in `TuningData.pictures`. `text` and `answer` are for people.
    """

    line: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    places: tuple[int, ...]
    pictures: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class TuningData:
    """All examples of a file, in its order, and its pictures, each once.

    `picture_digests` are those of what the model sees of them; `digest` is the file's sha256.
    """

    path: Path
    digest: str
    examples: tuple[Example, ...]
    pictures: tuple[ImageSource, ...]
    picture_digests: tuple[str, ...]


def read_data(path: Path, model_dir: Path) -> TuningData:
    """Read and check all of it; every picture is opened once.

    Raises:
        ConfigError: the file cannot be read, or a line of it cannot be learned from.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--data {path} cannot be read ({error.strerror}).") from None
    reader = _Reader(path.parent, model_dir)
    faults: list[str] = []
    num_lines = 0
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        num_lines += 1
        try:
            reader.read(number, line)
        except (MiniGPT4Error, ValueError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        shown = "\n".join(faults[:_MOST_FAULTS_SHOWN])
        raise ConfigError(
            f"--data {path}: {len(faults)} of {num_lines} lines cannot be learned from. Mend or "
            f"remove them:\n{shown}"
        )
    if not reader.examples:
        raise ConfigError(f"--data {path} is empty: it must hold a dialogue on each line.")
    return TuningData(
        path, hashlib.sha256(content).hexdigest(), tuple(reader.examples),
        tuple(reader.pictures), tuple(reader.digests),
    )  # fmt: skip


class _Reader:
    """Grows the examples and the pictures line by line."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self._folder = folder
        self._config: ModelConfig = load_config(model_dir)
        self._template: Template = find_template(self._config.template)
        self._tokenizer = Tokenizer(model_dir / TOKENIZER_NAME)
        self._numbers: dict[str, int] = {}
        self.examples: list[Example] = []
        self.pictures: list[ImageSource] = []
        self.digests: list[str] = []

    def read(self, number: int, line: bytes) -> None:
        """Take a line's examples, or none if one of them is at fault."""
        messages = [self._with_places(each) for each in read_messages(_messages_of(line))]
        _check_roles(messages)
        self.examples += [
            self._example(number, messages[:at], message)
            for at, message in enumerate(messages)
            if message.role == "assistant"
        ]

    def _with_places(self, message: Message) -> Message:
        parts = (self._placed(p) if isinstance(p, ImageSource) else p for p in message.content)
        return replace(message, content=tuple(parts))

    def _placed(self, source: ImageSource) -> ImageSource:
        value = str(source.value)
        if value[:5].lower() == "data:":
            return source
        if value.lower().startswith(("http://", "https://")):
            raise RequestError(f"{source.name} is an address. Download it, and name the file.")
        return ImageSource(self._folder / value, label=value)

    def _example(self, number: int, before: Sequence[Message], said: Message) -> Example:
        answer = "".join(part for part in said.content if isinstance(part, str)).strip()
        if not answer:
            raise RequestError("An answer is empty: write it, or drop the line.")
        for stop in self._template.stops:
            if stop in answer:
                raise RequestError(f"An answer holds {stop!r}, at which this model's answers end.")
        prompt = render(before, self._template)
        if not prompt.images:
            raise RequestError(
                "There is no picture before an answer: a projection learns from pictures alone."
            )
        encoded = self._tokenizer.encode_prompt(
            prompt, rows_per_image=self._config.rows_per_image,
            image_token_id=self._config.image_token_id,
        )  # fmt: skip
        answer_ids = self._ids_of(answer)
        length, limit = len(encoded.token_ids) + len(answer_ids), self._config.language
        if length > limit.context_length:
            raise RequestError(
                f"Prompt and answer have {length} tokens; the model holds {limit.context_length}. "
                "Shorten them, or divide the dialogue."
            )
        return Example(
            number, encoded.token_ids, answer_ids,
            tuple(span.start for span in encoded.image_spans),
            tuple(self._number_of(source) for source in prompt.images), prompt.text, answer,
        )  # fmt: skip

    def _ids_of(self, answer: str) -> tuple[int, ...]:
        """With the end that the model is to write: the template's separator, or else an EOS."""
        ids = self._tokenizer.encode(answer + self._template.separator)
        return tuple(ids) if self._template.separator else (*ids, self._tokenizer.eos_id)

    def _number_of(self, source: ImageSource) -> int:
        key = str(source.value)
        if key not in self._numbers:
            digest = load_image(source, self._config.vision).digest
            self._numbers[key] = len(self.pictures)
            self.pictures.append(source)
            self.digests.append(digest)
        return self._numbers[key]


def _messages_of(line: bytes) -> Sequence[Mapping[str, Any]]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"It is not UTF-8 text ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"It is no JSON ({str(error)[:80]}).") from None
    if not isinstance(record, dict) or "messages" not in record or record.keys() - _KEYS:
        seen = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise RequestError(f'It must be {{"messages": […]}}; seen: {str(seen)[:80]}.')
    return record["messages"]  # type: ignore[no-any-return]


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != wanted:
        raise RequestError(
            f"The roles are {', '.join(roles)}; 'user' and 'assistant' must take turns, and the "
            "assistant has the last word."
        )
