"""`minigpt4 chat`: a dialogue about pictures, in a terminal or through a pipe."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.batch.dialogue import Dialogue
from minigpt4_runtime.batch.finding import STDIN, read_place, source_of
from minigpt4_runtime.cli.options import (
    AllowLocalUrls,
    CacheWindow,
    ModelOptions,
    SamplingOptions,
    Task,
    spread_options,
)
from minigpt4_runtime.cli.terminal import is_interactive, note, read_line, report, use_line_editing
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import MiniGPT4Error, PromptTooLongError, RequestError
from minigpt4_runtime.messages import ImageSource

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

HELP = """\
/image PATH  show another picture, together with your next question; PATH may be an address
/reset       start over with the picture shown last
/save FILE   write the dialogue to a new file, as JSON
/help        show this
/quit        end; so do /exit and Ctrl-D
//TEXT       say something that begins with a slash
Ctrl-C       stop an answer"""


@spread_options
def chat(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="The picture to talk about, or its address; /image shows one too.",
        ),
    ] = None,
    *,
    task: Task = None,
    allow_local_urls: AllowLocalUrls = False,
    cache_window: CacheWindow = None,
    where: ModelOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk about a picture, over several turns.

    Answers go to stdout as they grow, all else to stderr. /help lists what else can be typed.
    Questions may also come through a pipe, one a line; the exit status is then 1 if one failed.
    """
    params = sampling.params()
    dialogue = Dialogue(task)
    if image is not None:
        dialogue.show(_find_image(image, allows_local=allow_local_urls))
    model = where.load(engine=EngineConfig(cache_window=cache_window))
    session = _Session(model, params, dialogue, allows_local=allow_local_urls)
    if is_interactive():
        use_line_editing()
        opening = f"Ask about {image}." if image else "Show a picture: /image PATH."
        note(f"{opening} /help lists what else you can type.")
    session.run()
    if session.num_failed and not is_interactive():
        raise typer.Exit(1)


class _Session:
    """Takes lines and answers them until there are no more."""

    def __init__(
        self, model: MiniGPT4, params: SamplingParams, dialogue: Dialogue, *, allows_local: bool
    ) -> None:
        self._model = model
        self._params = params
        self._dialogue = dialogue
        self._allows_local = allows_local
        self._num_evicted = 0  # Tokens, as far as a note has told.
        self.num_failed = 0

    def run(self) -> None:
        """Answer until there are no more lines, or until /quit."""
        while (line := _next_line()) not in ("/quit", "/exit"):
            try:
                self._take(line)
            except KeyboardInterrupt:
                note("Stopped.")
            except MiniGPT4Error as error:
                self.num_failed += 1
                report(error)
                if isinstance(error, PromptTooLongError):
                    note(
                        "/reset starts over with the picture shown last. With --cache-window COUNT "
                        "a dialogue never ends."
                    )

    def _take(self, line: str) -> None:
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            self._obey(*line.split(maxsplit=1))
        elif line:
            self._ask(line)

    def _obey(self, command: str, rest: str = "") -> None:
        if command == "/image":
            self._show(command, rest)
        elif command == "/reset":
            self._dialogue.reset()
            note("Starting over.")
        elif command == "/save":
            path = _expanded(Path(_argument(command, rest)))
            self._dialogue.save(path)
            note(f"The dialogue is in {path}.")
        elif command == "/help":
            note(HELP)
        else:
            raise RequestError(
                f"There is no command {command}. /help lists the commands; to say something that "
                "begins with a slash, write two."
            )

    def _show(self, command: str, text: str) -> None:
        try:
            image = _argument(command, text)
            source = _find_image(image, allows_local=self._allows_local)
            self._dialogue.show(source)
        except RequestError as error:
            # Otherwise the next question would be answered about another picture.
            former = self._dialogue.latest
            what_stays = f" Questions are still about {former.name}." if former else ""
            raise RequestError(f"{error}{what_stays}") from None
        note(f"{source.name} is shown with your next question.")

    def _ask(self, question: str) -> None:
        ends_line = True

        def show(text: str) -> None:
            nonlocal ends_line
            print(text, end="", flush=True)
            ends_line = ends_line and not text

        try:
            reply = self._dialogue.ask(self._model, question, self._params, show)
            ends_line = False
        finally:
            if not ends_line:
                print(flush=True)
        # One note whenever more has left: most questions find the window as it was.
        if reply.usage.evicted_tokens > self._num_evicted:
            note(
                f"The oldest {reply.usage.evicted_tokens} tokens have left the window; pictures "
                f"among them: {reply.usage.evicted_images}."
            )
        self._num_evicted = reply.usage.evicted_tokens


def _next_line() -> str:
    """Wait for the next line; the end of input is a /quit. Ctrl-C at the prompt is ignored."""
    while True:
        try:
            line = read_line("> ")
        except KeyboardInterrupt:
            if not is_interactive():
                raise
            note("\nCtrl-D or /quit ends.")
        else:
            return "/quit" if line is None else line.strip()


def _argument(command: str, text: str) -> str:
    """The text after a command, typed or dragged, without a shell's quotes and backslashes."""
    # A dragged path is escaped as for a shell: my\ picture.png. A typed one may have blanks.
    words = [text]
    if os.name != "nt" and not os.path.exists(text):  # noqa: PTH110 - it bears any name.
        with suppress(ValueError):  # A quote that belongs to the name.
            words = shlex.split(text)
    if len(words) == 1:
        text = words[0]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise RequestError(f"{command} wants a path after it, on the same line.")
    return text


def _find_image(text: str, *, allows_local: bool) -> ImageSource:
    place = read_place(text)
    if place == STDIN:
        raise RequestError("- is stdin, where the questions come from. Name a file or an address.")
    return source_of(
        _expanded(place) if isinstance(place, Path) else place, allows_local=allows_local
    )


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise RequestError(f"{path} is not a usable path ({error}).") from None
