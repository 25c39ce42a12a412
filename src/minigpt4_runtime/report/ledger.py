"""Records of finished work, so that a stopped run can continue without repeating it.

Owns   a .jsonl file that only grows: a record is written as soon as it is added.
Takes  JSON records; some of their keys together identify a record.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.new_folder import new_folder
from minigpt4_runtime.report.files import append_record, write_whole, writing


class Ledger:
    """Records that are identified by `keys`. Without a path they are kept only in memory.

    Example: scores by ("judge", "picture", "answer").
    """

    def __init__(self, path: Path | None, *, keys: tuple[str, ...]) -> None:
        """Read the existing records; an incomplete last line is dropped.

        Raises:
            ConfigError: the file cannot be read, or has other content.
        """
        self._path = path
        self._keys = keys
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path is not None and path.exists():
            self._take_up(path)

    def _take_up(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
        *lines, tail = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None or not record.keys() >= set(self._keys):
                raise ConfigError(
                    f"Line {number} of {path} is no record of this report. Give another --out."
                )
            self._records[self._key(record)] = record
        if tail:
            write_whole(path, content.removesuffix(tail))

    def find(self, **about: Any) -> dict[str, Any] | None:
        """The record with these values of the keys, if there is one."""
        return self._records.get(self._key(about))

    def add(self, record: dict[str, Any]) -> None:
        """Keep one more record, and write it to the disk at once."""
        self._records[self._key(record)] = record
        if self._path is not None:
            with writing(self._path), new_folder(self._path.parent):
                append_record(self._path, record)

    def _key(self, about: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(about[key] for key in self._keys)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
