"""The download of one published file: complete and checked under its name, or not there.

Owns   NAME.partial and its note, resuming, retries, the order of hosts, and the final check.
Takes  a SourceFile and its target path; gives its Arrival.
Never  gives a file its name before size and digest are right.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minigpt4_runtime.checkpoint.file_kind import begins_as_named, read_json
from minigpt4_runtime.checkpoint.folder import DISK_FULL
from minigpt4_runtime.checkpoint.sources import SourceFile
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.hub.download_record import Arrival, DownloadRecord
from minigpt4_runtime.hub.hosts import (
    FileAddress,
    Hiccup,
    HostRefusal,
    HostReply,
    TooFewBytes,
    find_address,
    open_reply,
)

if TYPE_CHECKING:
    from httpx2 import Client

PARTIAL_SUFFIX = ".partial"
# In a row, without a byte in between.
MAX_HICCUPS = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
_READ_BYTES = 4 * 2**20
# A text of up to this size is a server's message, and no weights.
_LONGEST_NOTE_BYTES = 4096


class Stopped(Exception):
    """Another download's failure, or Ctrl-C, ended this one; its bytes are kept."""


@dataclass(frozen=True)
class Watch:
    """The watcher of a download: `on_bytes` gets numbers of bytes (negative after a false start).

    `say` gets a text before each wait for a host.
    """

    on_bytes: Callable[[int], None]
    say: Callable[[str], None]
    stop: threading.Event

    def wait(self, seconds: float) -> None:
        """Wait, unless it is to stop."""
        if self.stop.wait(seconds):
            raise Stopped


class _Digests:
    """sha256, and md5 where a host tells it."""

    def __init__(self) -> None:
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        self.md5.update(chunk)


def download(
    file: SourceFile, target: Path, *, client: "Client", downloads: DownloadRecord, watch: Watch
) -> Arrival:
    """Bring a file to `target`, from the first of its hosts that gives it whole.

    Raises:
        CheckpointError: no host gives it; the message has what each said and the way by hand.
        Stopped: `watch` says so.
    """
    failures = []
    addresses = [find_address(place) for place in file.hosts]
    for address in addresses:
        try:
            return _Attempts(file, target, client, downloads, watch).from_host(address)
        except HostRefusal as refusal:
            failures.append(f"{address.host}: {refusal}")
        except OSError as error:
            raise CheckpointError(_describe_disk(target, error)) from None
    raise CheckpointError(describe_failure(file, addresses, failures))


def describe_failure(file: SourceFile, addresses: list[FileAddress], failures: list[str]) -> str:
    """The message about a file that no host gave, with the way by hand."""
    return (
        f"{file.name} could not be downloaded. {'. '.join(failures)}. By hand: download it from "
        f"{' or '.join(address.page for address in addresses)} into a folder DIR, and run the same "
        "command with --from DIR."
    )


def hash_file(path: Path, watch: Watch) -> tuple[int, str]:
    """Size and sha256 of a file that is here already."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as content:
        while chunk := content.read(_READ_BYTES):
            watch.wait(0)
            digest.update(chunk)
            size += len(chunk)
            watch.on_bytes(len(chunk))
    return size, digest.hexdigest()


def refuse_other_file(file: SourceFile, reply: HostReply) -> None:
    """Refuse at once a file of another size than published, or of another kind than its name says.

    Raises:
        HostRefusal: it is of another size, empty, a text, or of another kind.
    """
    if reply.size is not None and reply.size != (file.size or reply.size):
        raise HostRefusal(f"its file has {reply.size} bytes, and the published one {file.size}")
    head = reply.head
    if reply.start:
        return
    if not head:
        raise HostRefusal("its file is empty")
    # The last character may be cut.
    text = head.decode("utf-8", errors="ignore").strip()
    is_text = len(text.encode()) + 4 > len(head.strip()) and text.replace("\n", " ").isprintable()
    is_short = reply.size is not None and reply.size <= _LONGEST_NOTE_BYTES
    is_as_named = begins_as_named(file.name, head)
    if is_text and (not is_as_named or (is_short and not file.name.endswith(".json"))):
        raise HostRefusal(f"it gave a text in place of the file ({text[:80]!r})")
    if not is_as_named:
        raise HostRefusal(
            f"its file begins with {head[:8].hex(' ')}, as no {Path(file.name).suffix} does"
        )


@dataclass(frozen=True)
class _Attempts:
    """The attempts to download one file."""

    file: SourceFile
    target: Path
    client: "Client"
    downloads: DownloadRecord
    watch: Watch

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + PARTIAL_SUFFIX)

    @property
    def note(self) -> Path:
        """The note beside the partial file: address, validator, size and digest."""
        return self.target.with_name(self.target.name + ".note" + PARTIAL_SUFFIX)

    def from_host(self, address: FileAddress) -> Arrival:
        """Ask one host until the file is here, or the host refuses."""
        num_hiccups = 0
        while True:
            before = _size_of(self.partial)
            try:
                return self._attempt(address)
            except Hiccup as hiccup:
                self.watch.wait(0)  # Do not report a connection that breaks during a stop.
                if isinstance(hiccup, TooFewBytes):
                    self._forget()
                num_hiccups = 1 if _size_of(self.partial) > before else num_hiccups + 1
                if num_hiccups == MAX_HICCUPS:
                    raise HostRefusal(f"{hiccup}, {MAX_HICCUPS} times in a row") from None
                patience = FIRST_WAIT_SECONDS * 2 ** (num_hiccups - 1)
                asked = patience if hiccup.wait_seconds is None else hiccup.wait_seconds
                if asked > LONGEST_WAIT_SECONDS:
                    raise HostRefusal(f"{hiccup}, and asks to wait {asked:.0f} seconds") from None
                self.watch.say(
                    f"{self.file.name}, {address.host}: {hiccup}. Trying again in {asked:.0f} s."
                )
                self.watch.wait(asked)

    def _attempt(self, address: FileAddress) -> Arrival:
        note, start = self._read_note(address), 0
        validator = note.get("validator")
        expected = self.downloads.expected_sha256(self.file) or note.get("sha256")
        # Without a validator only a known digest tells whether old and new bytes belong together.
        if validator is not None or expected is not None:
            # The last byte again: a request for bytes behind the end would be an error.
            start = max(0, _size_of(self.partial) - 1)
        with open_reply(self.client, address, start=start, validator=validator) as reply:
            self._check(reply)
            self._refuse_mixture(note, reply)
            if not reply.start:
                # Before the note is written: it must not lie beside the bytes of another file.
                self._forget()
            self._write_note(address, reply)
            digests = _Digests()
            with self.partial.open("r+b" if reply.start else "wb") as content:
                self._read_start(content, reply.start, digests)
                try:
                    self._write(content, reply, digests)
                finally:
                    content.flush()
                    os.fsync(content.fileno())
            return self._finish(address, reply, digests)

    def _check(self, reply: HostReply) -> None:
        """Refuse a reply that cannot be the file, before its bytes are read."""
        expected = self.downloads.expected_sha256(self.file)
        if expected is not None and reply.sha256 is not None and reply.sha256 != expected:
            raise HostRefusal(self._describe_other(reply.sha256))
        refuse_other_file(self.file, reply)

    def _refuse_mixture(self, note: Mapping[str, Any], reply: HostReply) -> None:
        """Refuse another file's bytes, which hosts send that ignore If-Range."""
        for name in ("validator", "size") if reply.start else ():
            known, seen = note.get(name), getattr(reply, name)
            if None not in (known, seen) and known != seen:
                self._forget()
                raise Hiccup("its file is another one since the download began")

    def _read_start(self, content: BinaryIO, start: int, digests: _Digests) -> None:
        """Digest the bytes that are here already, and cut off any after them."""
        left = start
        while left:
            self.watch.wait(0)
            chunk = content.read(min(left, _READ_BYTES))
            digests.update(chunk)
            left -= len(chunk)
        content.truncate(start)
        self.watch.on_bytes(start)

    def _write(self, content: BinaryIO, reply: HostReply, digests: _Digests) -> None:
        num_bytes = reply.start
        try:
            for chunk in chain([reply.head], reply.chunks):
                content.write(chunk)
                digests.update(chunk)
                num_bytes += len(chunk)
                self.watch.on_bytes(len(chunk))
                if self.file.size is not None and num_bytes > self.file.size:
                    raise HostRefusal(
                        f"its file has more than the published {self.file.size} bytes"
                    )
                self.watch.wait(0)
        except BaseException:
            self.watch.on_bytes(-num_bytes)
            raise
        if reply.size is not None and num_bytes != reply.size:
            self.watch.on_bytes(-num_bytes)
            raise Hiccup(f"{num_bytes} of {reply.size} bytes came")

    def _finish(self, address: FileAddress, reply: HostReply, digests: _Digests) -> Arrival:
        size, sha256 = _size_of(self.partial), digests.sha256.hexdigest()
        if self.file.name.endswith(".json"):
            try:
                read_json(self.partial)
            except CheckpointError:
                self._forget()
                self.watch.on_bytes(-size)
                raise HostRefusal(f"its file of {size} bytes is not valid JSON") from None
        expected = self.downloads.expected_sha256(self.file) or reply.sha256
        is_damaged = reply.md5 not in (None, digests.md5.hexdigest())
        if is_damaged or sha256 != (expected or sha256) or size != (self.file.size or size):
            self._forget()
            self.watch.on_bytes(-size)
            if reply.start:
                raise Hiccup("the earlier bytes and the new ones are not one file")
            if is_damaged:
                raise Hiccup("the bytes do not have the md5 that it gives")
            raise HostRefusal(self._describe_other(sha256))
        arrival = Arrival(address.host, size, sha256)
        # First: a file without a record would be downloaded again.
        self.downloads.record(self.file, arrival)
        self.partial.replace(self.target)
        self.note.unlink(missing_ok=True)
        return arrival

    def _describe_other(self, sha256: str) -> str:
        """The message about a wrong digest, with the origin of the expected one."""
        first = self.downloads.first_arrival(self.file)
        if self.file.sha256 is not None:
            return f"its file has the sha256 {sha256}, and the published one {self.file.sha256}"
        if first is None:
            return f"its file has the sha256 {sha256}, and not the one that it gives"
        return (
            f"its file has the sha256 {sha256}, and the one that first came, from {first.host} on "
            f"{first.day}, had {first.sha256}: it was replaced, or is not what it seems. If you "
            f"know that it was replaced, delete its entry in {self.downloads.path}"
        )

    def _read_note(self, address: FileAddress) -> dict[str, Any]:
        """The note about the bytes that are here, if they came from this address."""
        try:
            note: dict[str, Any] = json.loads(self.note.read_text(encoding="utf-8"))
            return note if note["url"] == address.url else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _write_note(self, address: FileAddress, reply: HostReply) -> None:
        note = {"url": address.url} | {
            name: getattr(reply, name) for name in ("validator", "size", "sha256")
        }
        self.note.write_text(json.dumps(note), encoding="utf-8")

    def _forget(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _describe_disk(target: Path, error: OSError) -> str:
    if error.errno in DISK_FULL:
        return (
            f"The disk of {target.parent} is full. What came of {target.name} is kept: free some "
            "space, and the same command goes on from there."
        )
    return f"{target} cannot be written ({error.strerror or error})."
