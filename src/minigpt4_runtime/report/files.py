"""Reading and atomic writing of text files, and the folder of a report.

Owns   the names of a report's files, and their atomic replacement.
Takes  a Report of some kind, "clip" for example; gives clip.html, clip.json and clip.csv.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.new_folder import new_folder
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.table import Table


class Report(Protocol):
    """The result of a judge or a bench, in four formats."""

    def as_text(self) -> str:
        """A summary for the terminal."""

    def as_mapping(self) -> dict[str, Any]:
        """Everything, as JSON."""

    def as_rows(self) -> Table:
        """One row for each item."""

    def as_page(self) -> str:
        """A self-contained HTML page with plots and images."""


class ReportFolder:
    """The folder of --out, made when it is written to. It can hold several kinds of report."""

    def __init__(self, path: Path, kind: str) -> None:
        """Check that reports can be written, before anything is computed.

        Raises:
            ConfigError: the folder cannot be made or written to.
            BackendUnavailableError: a package for the page is not installed.
        """
        check_folder(path, "--out")
        require("jinja2", extra="eval")
        from minigpt4_runtime.report import chart  # noqa: F401 - its packages are checked too.

        self._path = path
        self._kind = kind

    @classmethod
    def open(cls, path: Path | None, kind: str) -> Self | None:
        """The folder at `path`; None without a path."""
        return None if path is None else cls(path, kind)

    def file(self, suffix: str) -> Path:
        """The path of this report's file with that suffix, such as `.jsonl` for its ledger."""
        return self._path / f"{self._kind}{suffix}"

    def write(self, report: Report) -> Path:
        """Write or replace the three files; return the page's path."""
        mapping = json.dumps(report.as_mapping(), ensure_ascii=False, indent=2)
        table, page = report.as_rows().as_csv(), report.as_page()
        with writing(self._path), new_folder(self._path):
            write_whole(self.file(".json"), mapping + "\n")
            write_whole(self.file(".csv"), table)
            write_whole(self.file(".html"), page)
        return self.file(".html")


def check_folder(path: Path, option: str) -> None:
    """Make sure that the folder of an option can be written to, or made, without making it yet.

    Raises:
        ConfigError: it cannot.
    """
    # A link that leads nowhere is there too. In a folder that may not be searched nothing is.
    is_there, above = os.path.lexists(path), path.parent
    if is_there and not path.is_dir():
        raise ConfigError(f"{option} is {path}, which is no folder. Name a folder.")
    if not os.path.lexists(above) or not above.is_dir():
        raise ConfigError(f"{option} is {path}, but there is no folder {above}.")
    if not os.access(path if is_there else above, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} is {path}, which may not be written. Check its permissions.")


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ConfigError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Check its path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}).") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: at every moment it has either the old or the new content.

    Raises:
        ConfigError: it cannot be written.
    """
    if isinstance(content, str):
        # Undecodable bytes of file names become JSON escapes such as \udc80, which read back alike.
        content = content.encode("utf-8", "backslashreplace")
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line to a .jsonl file, which is made if needed. It is on the disk at once.

    Raises:
        ConfigError: it cannot be written.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with writing(path), path.open("ab") as file:
        file.write(line.encode("utf-8", "backslashreplace"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}). "
            "What was written before is still there."
        ) from error
