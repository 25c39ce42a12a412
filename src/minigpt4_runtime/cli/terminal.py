"""What people see beside the answers: messages, the progress bar, and lines typed in.

Owns   stderr and the terminal. Answers alone go to stdout.
Takes  sentences and counts; draws a bar only where stderr is a terminal.
Never  knows what an answer is.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from minigpt4_runtime.report.files import Report, ReportFolder


def note(text: str) -> None:
    """Tell a person something that is not an answer."""
    # One write, or the lines of two threads run into each other.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report(error: object, *, about: str = "") -> None:
    """Tell what went wrong, and what about, where the message does not say so itself."""
    note(f"error: {error}" if about in str(error) else f"error: {about}: {error}")


def show_report(found: Report, folder: ReportFolder | None) -> None:
    """Print what was found, and say where the report of it is written."""
    print(found.as_text(), flush=True)
    if folder:
        note(f"The report is in {folder.write(found)}.")


def open_what_is_closed() -> None:
    """Make a closed stdin an empty one, and a closed stderr one without a reader."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 — Until the end.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def print_anything() -> None:
    """Let no character stop an answer: neither a file's odd name nor an old terminal's alphabet."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


class ProgressBar:
    """So many of so many, with the time that is left."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total) if progress else None

    def advance(self) -> None:
        """One more is done."""
        if self._progress and self._task is not None:
            self._progress.advance(self._task)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the terminal while lines are printed."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


@contextmanager
def progress_bar(total: int) -> Iterator[ProgressBar]:
    """A bar on stderr while this lasts, if there is more than one thing to do and a terminal."""
    if total < 2 or not sys.stderr.isatty():
        yield ProgressBar(None, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    # Redirecting would send the answers to stderr; they are printed with the bar aside instead.
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False,
    ) as progress:  # fmt: skip
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
    if is_interactive():
        try:
            import readline  # noqa: F401
        except ImportError:
            return
