"""Files that appear whole or not at all, and the folder of a report.

Owns   the names of a report's files, and that no older file is half replaced.
Takes  a Report of some kind, "clip" for example; gives clip.html, clip.json and clip.csv.
Never  draws or computes anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.page import INSTALL

if TYPE_CHECKING:
    from minigpt4_runtime.report.table import Table


class Report(Protocol):
    """What a judge comes to. All four say the same, each to another reader."""

    def as_text(self) -> str:
        """A summary for the terminal."""

    def as_mapping(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""

    def as_rows(self) -> Table:
        """One row for each thing that was judged."""

    def as_page(self) -> str:
        """HTML with plots, pictures and captions, complete in itself."""


class ReportFolder:
    """The folder that --out names; made if it is not there. Several kinds of report fit in one."""

    def __init__(self, path: Path, kind: str) -> None:
        """Check everything that writing needs before anything is computed.

        Raises:
            ConfigError: there can be no such folder.
            BackendUnavailableError: a package for the page is not installed.
        """
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out is {path}, which is no folder. Name a folder for the report.")
        if not path.parent.is_dir():
            raise ConfigError(f"--out is {path}, but there is no folder {path.parent}.")
        with writing(path):
            path.mkdir(exist_ok=True)
        if not os.access(path, os.W_OK):
            raise ConfigError(f"--out is {path}, which may not be written. Check its permissions.")
        require("jinja2", install=INSTALL)
        from minigpt4_runtime.report import chart  # noqa: F401 - its packages are checked too.

        self._path = path
        self._kind = kind

    @classmethod
    def open(cls, path: Path | None, kind: str) -> Self | None:
        """The folder at `path`; None where none is asked for."""
        return None if path is None else cls(path, kind)

    def file(self, suffix: str) -> Path:
        """Where a file of this report lies, such as its ledger: `.jsonl`."""
        return self._path / f"{self._kind}{suffix}"

    def write(self, report: Report) -> Path:
        """Write or replace the three files, and give the page's path."""
        mapping = json.dumps(report.as_mapping(), ensure_ascii=False, indent=2)
        write_whole(self.file(".json"), mapping + "\n")
        write_whole(self.file(".csv"), report.as_rows().as_csv())
        write_whole(self.file(".html"), report.as_page())
        return self.file(".html")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that at every moment there is either the old one or the new one, whole.

    Raises:
        ConfigError: it cannot be written.
    """
    if isinstance(content, str):
        # The odd bytes of a file's name become JSON's own \udc80: still valid, and read back alike.
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}). "
            "What was written before is still there."
        ) from error
