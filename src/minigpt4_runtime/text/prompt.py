"""Messages × template → text pieces with image slots between them.

Owns   the templates, as data, and the order in which the original joins a dialogue.
Takes  checked messages; gives a Script, and Prompts of it: pieces of text around image slots.
Never  tokenises. Users' input stays text: only a template, or a raw prompt in its stead, can place
       a control id or an image slot.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.messages import (
    TASK_NAMES,
    ContentPart,
    ImageSource,
    Message,
    Role,
    TaskName,
)

# The prompt that the command line, the API and the demo model's training share.
DESCRIBE_PROMPT = "Describe this image in detail."

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)


@dataclass(frozen=True)
class Template:
    """How one family of models was taught to take turns (upstream: conversation.py).

    `user_starts_with_bos`: a BOS id stands before each user turn (written `<s>` upstream).
    `answer_mark`: if the model writes this, its answer starts behind it. `tasks` it knows as a word
    in brackets before a question. `ends_untold`: an EOS id stands in place of a reply that is not
    told, as MiniGPT-v2's own page keeps its dialogues. `has_boxes`: its answers write parts of the
    picture as boxes; see `boxes`.
    """

    name: str
    system: str
    user: str
    assistant: str
    separator: str
    stops: tuple[str, ...]
    user_starts_with_bos: bool = False
    answer_mark: str = "Assistant:"
    has_boxes: bool = False
    tasks: tuple[TaskName, ...] = ()
    ends_untold: bool = False


TEMPLATES = {
    template.name: template
    for template in (
        Template("vicuna", _SYSTEM, "Human: ", "Assistant: ", "###", ("###",)),
        Template("llama2", _SYSTEM, "[INST] ", " [/INST] ", "", ("###",), True),
        Template(
            "minigptv2",
            "",
            "[INST] ",
            " [/INST]",
            "",
            ("###",),
            True,
            tasks=TASK_NAMES,
            ends_untold=True,
            has_boxes=True,
        ),
    )
}


def find_template(name: str) -> Template:
    """Look a template up by the name that a model folder states.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"The prompt template is {name!r}; known are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def check_task(task: TaskName | None, template: Template) -> None:
    """Refuse a task for a model that knows none of this name.

    Raises:
        RequestError: it does not.
    """
    if task is not None and task not in template.tasks:
        known = ", ".join(template.tasks) or "none: only MiniGPT-v2 has tasks"
        raise RequestError(
            f"task is {task!r}; known to this model's template, {template.name!r}, are {known}."
        )


class Control(Enum):
    """An id that no text becomes, as upstream writes it."""

    BOS = "<s>"
    EOS = "</s>"


# Text around control ids: ("a", Control.BOS, "b") is `a<s>b`.
Piece = tuple[str | Control, ...]


@dataclass(frozen=True)
class Prompt:
    """N + 1 pieces of text around N images. `text` shows the whole as upstream writes it.

    `begun` is the given beginning of the answer.
    """

    pieces: tuple[Piece, ...]
    images: tuple[ImageSource, ...]
    begun: str = ""

    @property
    def text(self) -> str:
        """For people to read: `<ImageHere>` for an image slot, `<s>` for a BOS."""
        texts = ("".join(_show(each) for each in piece) for piece in self.pieces)
        return IMAGE_PLACE.join(texts) + self.begun


# Where a picture stands in a text, as upstream writes it.
IMAGE_PLACE = "<ImageHere>"
_CONTROLS = {control.value: control for control in Control}


def _show(part: str | Control) -> str:
    return part.value if isinstance(part, Control) else part


class _Writer:
    """Grows a Prompt from left to right."""

    def __init__(self) -> None:
        self.pieces: list[list[str | Control]] = [[]]
        self.images: list[ImageSource] = []

    def text(self, text: str) -> None:
        piece = self.pieces[-1]
        if piece and isinstance(last := piece[-1], str):
            piece[-1] = last + text
        elif text:
            piece.append(text)

    def control(self, control: Control) -> None:
        self.pieces[-1].append(control)

    def image(self, source: ImageSource) -> None:
        self.text("<Img>")
        self.images.append(source)
        self.pieces.append(["</Img>"])


@dataclass(frozen=True)
class _Turn:
    """What one speaker says at once: texts and images in their order in the prompt.

    An assistant's turn without parts is not told.
    """

    role: Role
    parts: tuple[ContentPart, ...]


@dataclass(frozen=True)
class Script:
    """A dialogue in the order of its template, cut where its oldest turns can be left out.

    Each of the `exchanges` begins with a turn of the user, and has the answers to it.
    """

    template: Template
    system: str
    exchanges: tuple[tuple[_Turn, ...], ...]
    begun: str

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images, in the order of the prompt."""
        turns = (turn for exchange in self.exchanges for turn in exchange)
        return tuple(part for turn in turns for part in turn.parts if not isinstance(part, str))

    def prompt(self, first: int = 0, stop: int | None = None) -> Prompt:
        """The template's beginning, these exchanges, and the opening of the answer."""
        writer, template = _Writer(), self.template
        writer.text(self.system + template.separator)
        for exchange in self.exchanges[first:stop]:
            for turn in exchange:
                if turn.role == "user" and template.user_starts_with_bos:
                    writer.control(Control.BOS)
                speaker = template.user if turn.role == "user" else template.assistant
                _write_turn(writer, template, speaker, turn.parts)
        writer.text(template.assistant)
        return Prompt(
            tuple(tuple(piece) for piece in writer.pieces), tuple(writer.images), self.begun
        )


def render(messages: Sequence[Message], template: Template) -> Prompt:
    """The prompt of a whole dialogue; see `write_script`."""
    return write_script(messages, template).prompt()


def write_script(messages: Sequence[Message], template: Template) -> Script:
    """Join a dialogue as upstream's Conversation does, and open the assistant's turn.

    System messages, wherever they stand, replace the template's own together. Within a user message
    images come first: each opens a turn, and the text after the last one continues its turn, as
    upstream's upload_img and ask do. Messages stay in their order, so a text before an image can
    be said in two messages. A last message by the assistant begins the answer.

    Raises:
        RequestError: a message has a task that the template does not know.
    """
    said = [message for message in messages if message.role != "system"]
    is_begun = bool(said) and said[-1].role == "assistant"
    begun = _joined_text(said.pop()) if is_begun else ""
    told = [_joined_text(message) for message in messages if message.role == "system"]
    turns: list[_Turn] = []
    for role, group in groupby(said, key=lambda message: message.role):
        if role == "assistant":
            turns += [
                _Turn(role, (_joined_text(message),) if message.content else ())
                for message in group
            ]
        else:
            parts = [part for message in group for part in _user_parts(message, template)]
            turns += [_Turn(role, tuple(turn)) for turn in _user_turns(parts)]
    # What the assistant says before any user belongs to the first exchange.
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
    ends = (*starts[1:], len(turns))
    exchanges = [tuple(turns[i:j]) for i, j in zip((0, *starts[1:]), ends, strict=True)]
    system = "\n".join(told) if told else template.system
    return Script(template, system, tuple(exchanges), begun)


def _joined_text(message: Message) -> str:
    return "".join(part for part in message.content if isinstance(part, str))


def _user_parts(message: Message, template: Template) -> list[ContentPart]:
    """The images first, then the texts, of which the first has the word of the task before it."""
    # The models were only shown questions that follow their picture. `sorted` keeps the order else.
    parts = sorted(message.content, key=lambda part: isinstance(part, str))
    check_task(message.task, template)
    words = tuple(f"[{task}]" for task in template.tasks)
    first = next((at for at, part in enumerate(parts) if isinstance(part, str)), len(parts))
    text = "".join(part for part in parts[first : first + 1] if isinstance(part, str))
    # A word that is typed counts.
    if message.task is not None and not text.startswith(words):
        parts[first : first + 1] = [f"[{message.task}] {text}" if text else f"[{message.task}]"]
    return parts


def _user_turns(parts: Sequence[ContentPart]) -> list[list[ContentPart]]:
    """Cut a user's consecutive parts into upstream's turns: [picture, " " + text] or [text]."""
    turns: list[list[ContentPart]] = []
    for part in parts:
        if isinstance(part, str) and turns and isinstance(turns[-1][-1], ImageSource):
            turns[-1].append(" " + part)
        else:
            turns.append([part])
    return turns


def _write_turn(
    writer: _Writer, template: Template, speaker: str, parts: Sequence[ContentPart]
) -> None:
    writer.text(speaker)
    if not parts and template.ends_untold:
        writer.control(Control.EOS)
    for part in parts:
        writer.image(part) if isinstance(part, ImageSource) else writer.text(part)
    # Upstream writes no separator after an empty turn.
    if any(isinstance(part, ImageSource) or part for part in parts):
        writer.text(template.separator)


def read_raw(text: str, pictures: Sequence[ImageSource]) -> Prompt:
    """A text as it is: `<ImageHere>` is a picture's place, `<s>` and `</s>` are control ids.

    Raises:
        RequestError: it has not as many places as there are pictures.
    """
    pieces = text.split(IMAGE_PLACE)
    if len(pieces) - 1 != len(pictures):
        raise RequestError(
            f"The text has {len(pieces) - 1} places {IMAGE_PLACE} and there are {len(pictures)} "
            "pictures. Give one for each place."
        )
    return Prompt(tuple(map(_read_piece, pieces)), tuple(pictures))


def _read_piece(text: str) -> Piece:
    parts = re.split(f"({'|'.join(map(re.escape, _CONTROLS))})", text)
    return tuple(_CONTROLS.get(part, part) for part in parts if part)
