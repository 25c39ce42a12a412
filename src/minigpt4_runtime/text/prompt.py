"""Messages × template → text pieces with image slots between them.

Owns   the templates, as data, and the order in which the original joins a dialogue.
Takes  checked messages; gives a Script, and Prompts of it: pieces of text around image slots.
Never  tokenises. Users' input stays text: only a template can place a BOS or an image slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import ContentPart, ImageSource, Message, Role

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
    `answer_mark`: if the model writes this, its answer starts behind it.
    `has_boxes`: its answers write parts of the picture as boxes; see `boxes`.
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


TEMPLATES = {
    template.name: template
    for template in (
        Template("vicuna", _SYSTEM, "Human: ", "Assistant: ", "###", ("###",)),
        Template("llama2", _SYSTEM, "[INST] ", " [/INST] ", "", ("###",), True),
        Template("minigptv2", "", "[INST] ", " [/INST]", "", ("###",), True, has_boxes=True),
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


# A piece is text cut where a BOS id stands: ("a", "b") is `a<s>b`.
Piece = tuple[str, ...]


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
        return "<ImageHere>".join("<s>".join(piece) for piece in self.pieces) + self.begun


class _Writer:
    """Grows a Prompt from left to right."""

    def __init__(self) -> None:
        self.pieces: list[list[str]] = [[""]]
        self.images: list[ImageSource] = []

    def text(self, text: str) -> None:
        self.pieces[-1][-1] += text

    def begin_of_sequence(self) -> None:
        self.pieces[-1].append("")

    def image(self, source: ImageSource) -> None:
        self.text("<Img>")
        self.images.append(source)
        self.pieces.append(["</Img>"])


@dataclass(frozen=True)
class _Turn:
    """What one speaker says at once: texts and images in their order in the prompt."""

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
                    writer.begin_of_sequence()
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
    """
    said = [message for message in messages if message.role != "system"]
    is_begun = bool(said) and said[-1].role == "assistant"
    begun = _joined_text(said.pop()) if is_begun else ""
    told = [_joined_text(message) for message in messages if message.role == "system"]
    turns: list[_Turn] = []
    for role, group in groupby(said, key=lambda message: message.role):
        if role == "assistant":
            turns += [_Turn(role, (_joined_text(message),)) for message in group]
        else:
            parts = [part for message in group for part in _images_first(message)]
            turns += [_Turn(role, tuple(turn)) for turn in _user_turns(parts)]
    # What the assistant says before any user belongs to the first exchange.
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
    ends = (*starts[1:], len(turns))
    exchanges = [tuple(turns[i:j]) for i, j in zip((0, *starts[1:]), ends, strict=True)]
    system = "\n".join(told) if told else template.system
    return Script(template, system, tuple(exchanges), begun)


def _joined_text(message: Message) -> str:
    return "".join(part for part in message.content if isinstance(part, str))


def _images_first(message: Message) -> list[ContentPart]:
    # The models were only shown questions that follow their picture. `sorted` keeps the order else.
    return sorted(message.content, key=lambda part: isinstance(part, str))


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
    writer: _Writer, template: Template, role: str, parts: Sequence[ContentPart]
) -> None:
    writer.text(role)
    for part in parts:
        writer.image(part) if isinstance(part, ImageSource) else writer.text(part)
    # Upstream writes no separator after an empty turn.
    if any(isinstance(part, ImageSource) or part for part in parts):
        writer.text(template.separator)
