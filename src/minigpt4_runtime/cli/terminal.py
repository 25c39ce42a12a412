"""The terminal beside the answers: messages, progress bars, and typed lines.

Owns   stderr and the terminal. Only answers go to stdout.
Takes  sentences and counts; draws bars only if stderr is a terminal.
Never  knows about answers.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from minigpt4_runtime.report.files import Report, ReportFolder


def note(text: str) -> None:
    """Tell a person something that is not an answer."""
    # One write, or the lines of two threads run into each other.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report(error: object, *, about: str = "") -> None:
    """Report an error, with its subject if the message does not name it."""
    note(f"error: {error}" if about in str(error) else f"error: {about}: {error}")


def show_report(found: Report, folder: ReportFolder | None) -> None:
    """Print a report, and name the file that it is written to."""
    print(found.as_text(), flush=True)
    if folder:
        note(f"The report is in {folder.write(found)}.")


def open_what_is_closed() -> None:
    """Replace a closed stdin by an empty one, and a closed stderr by the null device."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 — Until the end.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def print_anything() -> None:
    """Print every character, also of files' undecodable names and on old terminals."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def open_bars(*columns: ProgressColumn, is_shown: bool = True, redirects: bool = True) -> Progress:
    """Bars on stderr, drawn only on a terminal; `redirects` lets lines pass above them."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    console.quiet = not (is_shown and console.is_terminal)
    return Progress(
        *columns, console=console, transient=True, disable=console.quiet,
        redirect_stdout=redirects, redirect_stderr=redirects,
    )  # fmt: skip


class ProgressBar:
    """The number of things done of all, and the time that is left."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def advance(self, count: int = 1) -> None:
        """One more is done, or so many."""
        self._progress.advance(self._task, count)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the terminal while lines are printed."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


@contextmanager
def progress_bar(total: int) -> Iterator[ProgressBar]:
    """A bar on stderr while this lasts, if there is more than one thing to do and a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    # Redirecting would send the answers to stderr; they are printed with the bar aside instead.
    is_shown = total > 1 and sys.stderr.isatty()
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with open_bars(*columns, is_shown=is_shown, redirects=False) as progress:
        yield ProgressBar(progress, total)


def is_interactive() -> bool:
    """Whether a person types the input."""
    return sys.stdin.isatty()


def read_line(prompt: str) -> str | None:
    """Read one line without its end; None when there are no more. Only a person sees the prompt."""
    if is_interactive() and sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            note("")
            return None
    if is_interactive():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def use_line_editing() -> None:
    """Give `input` arrow keys and a history, where Python has readline. Windows has its own."""
    with suppress(ImportError):
        import readline  # noqa: F401
