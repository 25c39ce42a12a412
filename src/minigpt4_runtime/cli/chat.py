"""`minigpt4 chat`: a dialogue about pictures, in a terminal or through a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.dialogue import Dialogue
from minigpt4_runtime.cli.options import ModelOptions, SamplingOptions, spread_options
from minigpt4_runtime.cli.terminal import is_interactive, note, read_line, report, use_line_editing
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import MiniGPT4Error, PromptTooLongError, RequestError

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

HELP = """\
/image PATH  show another picture, together with your next question
/reset       start over with the picture shown last
/save FILE   write the dialogue to a new file, as JSON
/help        show this
/quit        end; so do /exit and Ctrl-D
//TEXT       say something that begins with a slash
Ctrl-C       stop an answer"""


@spread_options
def chat(
    picture: Annotated[
        Path | None,
        typer.Argument(metavar="IMAGE", help="The picture to talk about; /image shows one too."),
    ] = None,
    *,
    where: ModelOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk about a picture, over several turns.

    Answers go to stdout as they grow, all else to stderr. /help lists what else can be typed.
    Questions may also come through a pipe, one a line; the exit status is then 1 if one failed.
    """
    params = sampling.params()
    dialogue = Dialogue()
    if picture is not None:
        dialogue.show(picture)
    session = _Session(where.load(), params, dialogue)
    if is_interactive():
        use_line_editing()
        opening = f"Ask about {picture}." if picture else "Show a picture: /image PATH."
        note(f"{opening} /help lists what else you can type.")
    session.run()
    if session.num_failed and not is_interactive():
        raise typer.Exit(1)


class _Session:
    """Takes lines and answers them until there are no more."""

    def __init__(self, model: MiniGPT4, params: SamplingParams, dialogue: Dialogue) -> None:
        self._model = model
        self._params = params
        self._dialogue = dialogue
        self.num_failed = 0

    def run(self) -> None:
        """Return when there are no more lines, or at /quit."""
        while (line := _next_line()) not in ("/quit", "/exit"):
            try:
                self._take(line)
            except KeyboardInterrupt:
                note("Stopped.")
            except MiniGPT4Error as error:
                self.num_failed += 1
                report(error)
                if isinstance(error, PromptTooLongError):
                    note("/reset starts over with the picture shown last.")

    def _take(self, line: str) -> None:
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            self._obey(*line.split(maxsplit=1))
        elif line:
            self._ask(line)

    def _obey(self, command: str, rest: str = "") -> None:
        if command == "/image":
            picture = _to_path(command, rest)
            self._dialogue.show(picture)
            note(f"{picture} is shown with your next question.")
        elif command == "/reset":
            self._dialogue.reset()
            note("Starting over.")
        elif command == "/save":
            path = _to_path(command, rest)
            self._dialogue.save(path)
            note(f"The dialogue is in {path}.")
        elif command == "/help":
            note(HELP)
        else:
            raise RequestError(
                f"There is no command {command}. /help lists the commands; to say something that "
                "begins with a slash, write two."
            )

    def _ask(self, question: str) -> None:
        ends_line = True

        def show(text: str) -> None:
            nonlocal ends_line
            print(text, end="", flush=True)
            ends_line = ends_line and not text

        try:
            self._dialogue.ask(self._model, question, self._params, show)
            ends_line = False
        finally:
            if not ends_line:
                print(flush=True)


def _next_line() -> str:
    """Wait for the next line; the end is a /quit. A person's Ctrl-C at the prompt ends nothing."""
    while True:
        try:
            line = read_line("> ")
        except KeyboardInterrupt:
            if not is_interactive():
                raise
            note("\nCtrl-D or /quit ends.")
        else:
            return "/quit" if line is None else line.strip()


def _to_path(command: str, text: str) -> Path:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise RequestError(f"{command} wants a path after it, on the same line.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{text} is not a usable path ({error}).") from None
