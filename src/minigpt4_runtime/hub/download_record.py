"""The record of first downloads, which later ones must equal: trust on first use.

Owns   downloads.json in the cache: host, size, sha256 and day of every file's first arrival.
Takes  a source; gives its expected digest, from the table or from the first download.
Never  forgets a deleted model: a second fetch must bring the same files. Only a file that a
       conversion refused is forgotten.
"""

import json
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from minigpt4_runtime.checkpoint.file_kind import read_json
from minigpt4_runtime.checkpoint.sources import SourceFile
from minigpt4_runtime.errors import CheckpointError

RECORD_NAME = "downloads.json"


@dataclass(frozen=True)
class Arrival:
    """A complete download: its host, size, digest and day."""

    host: str
    size: int
    sha256: str
    day: str = ""


class DownloadRecord:
    """The arrivals, under each file's first place. Any number of threads may write to it."""

    def __init__(self, home: Path) -> None:
        self.path = home / RECORD_NAME
        self._lock = threading.Lock()
        self._arrivals: dict[str, Arrival] = {}
        if self.path.exists():
            try:
                entries = read_json(self.path)
                self._arrivals = {place: Arrival(**entry) for place, entry in entries.items()}
            except (CheckpointError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path} is damaged ({error}). It holds the digests of what was "
                    "downloaded before; delete it to begin anew."
                ) from None

    def first_arrival(self, file: SourceFile) -> Arrival | None:
        """This file's first arrival, if it was ever downloaded."""
        return self._arrivals.get(file.hosts[0])

    def expected_sha256(self, file: SourceFile) -> str | None:
        """The digest that the file must have: the table's, or that of the first arrival."""
        first = self.first_arrival(file)
        return file.sha256 or (first.sha256 if first else None)

    def record(self, file: SourceFile, arrival: Arrival) -> None:
        """Record an arrival, if it is the first of this file."""
        with self._lock:
            if file.hosts[0] in self._arrivals:
                return
            day = datetime.now(UTC).date().isoformat()
            self._arrivals[file.hosts[0]] = Arrival(arrival.host, arrival.size, arrival.sha256, day)
            self._write()

    def forget(self, file: SourceFile) -> None:
        """Drop a wrong file's record, so that the next arrival is the first."""
        with self._lock:
            if self._arrivals.pop(file.hosts[0], None) is not None:
                self._write()

    def _write(self) -> None:
        entries = {place: asdict(each) for place, each in sorted(self._arrivals.items())}
        # Written beside and renamed: an interruption leaves the old one or the new one.
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path)
