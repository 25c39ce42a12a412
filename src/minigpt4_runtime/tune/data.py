"""Training data: dialogues about pictures, checked whole before anything is trained.

Owns   what a dialogue must be, and the ids that the model reads and learns.
Takes  the file, and a model folder for its tokenizer, template and sizes; gives TuningData.
Never  lets a bad dialogue pass: every one is named, with its place.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError, MiniGPT4Error, RequestError
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.messages import ImageSource, Message, read_messages
from minigpt4_runtime.text.prompt import Template, find_template, render
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.tune.layouts import Entry, open_records

_MOST_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """One answer, and all that stands before it.

    `prompt_ids` has rows of pictures from each of `places` on, whose pictures are `pictures`, as
    numbers in `TuningData.pictures`. `place` in the file, `text` and `answer` are for people.
    """

    place: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    places: tuple[int, ...]
    pictures: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class TuningData:
    """All examples of a file, in its order, and its pictures, each once.

    `picture_digests` are those of what the model sees of them; `digest` has all of it.
    """

    digest: str
    examples: tuple[Example, ...]
    pictures: tuple[ImageSource, ...]
    picture_digests: tuple[str, ...]


def read_data(
    path: Path, model_dir: Path, *, pictures: Path | None = None, needs_pictures: bool = True
) -> TuningData:
    """Read and check all of it; every picture is opened once.

    Paths of pictures count from the folder `pictures`; without one, from where the layout has them.
    Adapters on the language model learn from dialogues without a picture too, and a projection
    `needs_pictures`.

    Raises:
        ConfigError: the file cannot be read, an entry of it cannot be learned from, or there is no
            folder `pictures`.
    """
    if pictures is not None and not pictures.is_dir():
        raise ConfigError(f"{pictures}, where pictures are to be, is no folder.")
    records = open_records(path)
    reader = _Reader(pictures or records.folder, model_dir, needs_pictures=needs_pictures)
    faults: list[str] = []
    for entry in records.entries:
        try:
            reader.read(entry)
        except (MiniGPT4Error, ValueError) as error:
            faults.append(f"{entry.place}: {error}")
    if faults:
        shown = "\n".join(faults[:_MOST_FAULTS_SHOWN])
        raise ConfigError(
            f"{path}: {len(faults)} of {len(records.entries)} dialogues cannot be learned "
            f"from. Mend or remove them:\n{shown}"
        )
    digest = hashlib.sha256(" ".join((records.digest, *reader.digests)).encode()).hexdigest()
    return TuningData(digest, tuple(reader.examples), tuple(reader.pictures), tuple(reader.digests))


class _Reader:
    """Grows the examples and the pictures line by line."""

    def __init__(self, folder: Path, model_dir: Path, *, needs_pictures: bool) -> None:
        self._folder = folder
        self._needs_pictures = needs_pictures
        self._config: ModelConfig = load_config(model_dir)
        self._template: Template = find_template(self._config.template)
        self._tokenizer = Tokenizer(model_dir / TOKENIZER_NAME)
        self._numbers: dict[str, int] = {}
        self.examples: list[Example] = []
        self.pictures: list[ImageSource] = []
        self.digests: list[str] = []

    def read(self, entry: Entry) -> None:
        """Take an entry's examples, or none if one of them is at fault."""
        messages = [self._with_places(each) for each in read_messages(entry.read())]
        _check_roles(messages)
        self.examples += [
            self._example(entry.place, messages[:at], message)
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

    def _example(self, place: str, before: Sequence[Message], said: Message) -> Example:
        answer = "".join(part for part in said.content if isinstance(part, str)).strip()
        if not answer:
            raise RequestError("An answer is empty: write it, or drop it.")
        for stop in self._template.stops:
            if stop in answer:
                raise RequestError(f"An answer holds {stop!r}, at which this model's answers end.")
        prompt = render(before, self._template)
        if self._needs_pictures and not prompt.images:
            raise RequestError(
                "There is no picture before an answer: a projection learns from pictures alone. "
                "With --lora this can be learned from."
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
            place, encoded.token_ids, answer_ids,
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


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != wanted:
        raise RequestError(
            f"The roles are {', '.join(roles)}; 'user' and 'assistant' must take turns, and the "
            "assistant has the last word."
        )
