"""Where the files of a run are kept: a folder of this machine, or one in an object store.

Owns   the checks before a run, and how files there are listed, read and written.
Takes  a path or an address as typed; file names and their bytes.
Never  shows half a file of its own, or knows what is in one. (A store that does not put objects
       whole, as sftp, can keep half of one when this program dies.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from minigpt4_runtime.cluster.stores import is_in_store, open_store, told
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import write_whole, writing


class ResultPlace(Protocol):
    """A folder of files, which need not be there yet."""

    def __str__(self) -> str:
        """As it was typed."""

    def names(self) -> set[str]:
        """The files and folders in it; none if it is not there.

        Raises:
            ConfigError: it cannot be listed.
        """

    def make(self) -> None:
        """Make it ready for files.

        Raises:
            ConfigError: it cannot be made or written to.
        """

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            ConfigError: it cannot be read.
        """

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file: at every moment it has the old or the new content.

        Raises:
            ConfigError: it cannot be written.
        """


def open_place(place: str) -> ResultPlace:
    """The place at this path or address.

    Raises:
        ConfigError: it is none, or no store is known for it.
    """
    if place.endswith((".json", ".jsonl")):
        raise ConfigError(f"--out is {place}, and with --ray it is a folder. Name one.")
    return StorePlace(place) if is_in_store(place) else LocalPlace(Path(place))


class LocalPlace:
    """A folder of this machine, whose parent has to be there."""

    def __init__(self, path: Path) -> None:
        """Check that there is a folder, or can be one."""
        self._path = path
        if not path.parent.is_dir():
            raise ConfigError(f"--out is {path}, but there is no folder {path.parent}.")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out is {path}, and with --ray it is a folder. Name one.")

    def __str__(self) -> str:
        """As it was typed."""
        return str(self._path)

    def names(self) -> set[str]:
        """The files and folders in it; none if it is not there."""
        with writing(self._path):
            return {each.name for each in self._path.iterdir()} if self._path.exists() else set()

    def make(self) -> None:
        """Make the folder; remove what a program that was killed while it wrote has left."""
        with writing(self._path):
            self._path.mkdir(exist_ok=True)
            for unfinished in self._path.glob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
        if not os.access(self._path, os.W_OK):
            raise ConfigError(
                f"--out is {self._path}, which may not be written. Check its permissions."
            )

    def read(self, name: str) -> bytes:
        """The content of a file."""
        try:
            return (self._path / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._path / name} cannot be read ({error.strerror}).") from None

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file at once."""
        write_whole(self._path / name, content)


class StorePlace:
    """A prefix of an object store, where an object is whole or not there, and no folder is made."""

    def __init__(self, address: str) -> None:
        """Open the store."""
        self._address = address.rstrip("/")
        self._store, self._folder = open_store(self._address)

    def __str__(self) -> str:
        """As it was typed."""
        return self._address

    def names(self) -> set[str]:
        """The objects and prefixes in it; none if there are none."""
        self._store.invalidate_cache()  # Another program may have written since.
        try:
            found = self._store.ls(self._folder, detail=False)
        except FileNotFoundError:
            return set()
        except Exception as error:  # noqa: BLE001 - each store has errors of its own.
            raise ConfigError(f"{self._address} cannot be listed ({told(error)}).") from None
        return {name for path in found if (name := path.rstrip("/").rpartition("/")[2])}

    def make(self) -> None:
        """Nothing: an object needs no folder."""

    def read(self, name: str) -> bytes:
        """The content of an object."""
        try:
            return bytes(self._store.cat_file(f"{self._folder}/{name}"))
        except Exception as error:  # noqa: BLE001 - each store has errors of its own.
            raise ConfigError(f"{self._address}/{name} cannot be read ({told(error)}).") from None

    def write(self, name: str, content: bytes) -> None:
        """Put an object."""
        try:
            self._store.pipe_file(f"{self._folder}/{name}", content)
        except Exception as error:  # noqa: BLE001 - each store has errors of its own.
            raise ConfigError(
                f"{self._address}/{name} cannot be written ({told(error)}). "
                "What was written before is still there."
            ) from None
