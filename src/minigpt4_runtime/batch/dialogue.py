"""A dialogue about images, turn by turn.

Owns   the turns, the image shown last, and the images that wait for the next question.
Takes  questions and images; a model answers. A question that fails leaves no trace.
Never  reads input or prints answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import ImageSource, Message, Reply, TaskName, TextDelta


class Streams(Protocol):
    """The part of a model that a dialogue uses."""

    def stream(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None
    ) -> Iterable[TextDelta]:
        """Answer the last message, giving the text as it grows. The last delta has the reply."""


class Dialogue:
    """The turns so far. `show` images and `ask` questions, which all have the same task."""

    def __init__(self, task: TaskName | None = None) -> None:
        self._task = task
        self._turns: list[Message] = []
        self._waiting: list[ImageSource] = []
        self.latest: ImageSource | None = None

    def show(self, image: ImageSource) -> None:
        """Let the next question be about this image too.

        Raises:
            ImageError: the image cannot be read; nothing changes then.
        """
        from minigpt4_runtime.images.pixels import open_rgb

        if callable(image.value):  # It is fetched now, and not again with every question.
            image = replace(image, value=image.value())
        open_rgb(image)
        self.latest = image
        self._waiting.append(image)

    def reset(self) -> None:
        """Forget the turns; the image shown last waits for the first question."""
        self._turns = []
        self._waiting = [self.latest] if self.latest else []

    def ask(
        self,
        model: Streams,
        question: str,
        params: SamplingParams,
        on_text: Callable[[str], None],
    ) -> Reply:
        """Ask, and hand the answer's text on as it grows. Ctrl-C keeps the answer so far.

        Raises:
            RequestError: no image was shown, or the model cannot serve the question.
        """
        if self.latest is None:
            raise RequestError("There is no picture to talk about. Show one: /image PATH")
        asked = Message("user", (*self._waiting, question), self._task)
        answer, reply = "", None
        try:
            for delta in model.stream([*self._turns, asked], params):
                reply = delta.reply
                answer = reply.text if reply else answer + delta.text
                on_text(delta.text)
        except KeyboardInterrupt:
            if answer.strip():
                self._keep(asked, answer.strip())
            raise
        assert reply is not None, "a stream ends with its reply"
        self._keep(asked, answer)
        return reply

    def _keep(self, asked: Message, answer: str) -> None:
        self._turns += [asked, Message("assistant", (answer,))]
        self._waiting = []

    def save(self, path: Path) -> None:
        """Write the dialogue as JSON, in the form that `MiniGPT4.chat` takes.

        Raises:
            RequestError: nothing was said yet, or the file exists or cannot be written.
        """
        if not self._turns:
            raise RequestError("There is nothing to save yet: ask something first.")
        turns = [
            {"role": turn.role, "content": _as_json(turn)}
            | ({"task": turn.task} if turn.task else {})
            for turn in self._turns
        ]
        text = json.dumps(turns, ensure_ascii=False, indent=2) + "\n"
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError:
            raise RequestError(f"{path} exists already. Give another name.") from None
        except OSError as error:
            raise RequestError(
                f"{path} cannot be written ({error.strerror}). Give another name."
            ) from None


def _as_json(turn: Message) -> str | list[dict[str, Any]]:
    if turn.role == "assistant":
        return "".join(str(part) for part in turn.content)
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.name}}
        for part in turn.content
    ]
