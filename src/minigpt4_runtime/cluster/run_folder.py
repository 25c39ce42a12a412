"""The folder of a run: what it is about, and its records in shards.

Owns   run.json, the cutting of the list into shards, and the two forms of a shard's file.
Takes  a place, the list and the settings of a run; the records of whole shards. Gives what is
       still to ask.
Never  holds half a shard: a file appears whole, with exactly one record for each of its images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minigpt4_runtime.cluster.result_places import ResultPlace
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require

RUN_FILE = "run.json"
PICTURES_PER_SHARD = 1000
# A record as a mapping, with JSON's kinds of values.
Row = Mapping[str, Any]


class ShardForm(Protocol):
    """How a shard's records are a file."""

    def pack(self, rows: Sequence[Row]) -> bytes:
        """The whole file."""

    def unpack(self, content: bytes) -> list[dict[str, Any]]:
        """The records again, or a ValueError."""


class JsonLinesForm:
    """One record a line, as `describe --out FILE.jsonl` writes them."""

    def pack(self, rows: Sequence[Row]) -> bytes:
        """The whole file."""
        return "".join(map(_as_line, rows)).encode("utf-8", "backslashreplace")

    def unpack(self, content: bytes) -> list[dict[str, Any]]:
        """The records again, or a ValueError."""
        return [json.loads(line) for line in content.splitlines()]


class ParquetForm:
    """A table with a row for each record; its columns are a record's keys in every shard."""

    def pack(self, rows: Sequence[Row]) -> bytes:
        """The whole file."""
        pyarrow = require("pyarrow", extra="ray")
        sink = pyarrow.BufferOutputStream()
        table = pyarrow.Table.from_pylist(_as_utf8(rows), schema=self._schema())
        require("pyarrow.parquet", extra="ray").write_table(table, sink)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def unpack(self, content: bytes) -> list[dict[str, Any]]:
        """The records again, or a ValueError."""
        source = require("pyarrow", extra="ray").BufferReader(content)
        with require("pyarrow.parquet", extra="ray").ParquetFile(source) as file:
            rows: list[dict[str, Any]] = file.read().to_pylist()
        return rows

    @staticmethod
    def _schema() -> Any:
        pa = require("pyarrow", extra="ray")
        numbers = pa.list_(pa.int64())
        box = pa.struct([
            ("label", pa.string()), ("box", numbers), ("start", pa.int64()), ("stop", pa.int64()),
        ])  # fmt: skip
        kinds = {
            "image": pa.string(), "answer": pa.string(), "finish_reason": pa.string(),
            "prompt_tokens": pa.int64(), "completion_tokens": pa.int64(),
            "evicted_tokens": pa.int64(), "token_ids": numbers, "boxes": pa.list_(box),
            "picture_size": numbers, "seconds": pa.float64(), "error": pa.string(),
        }  # fmt: skip
        return pa.schema(kinds.items())


def _as_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _as_utf8(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with names that a table can hold: undecodable bytes of file names are escaped."""
    return [
        {
            key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str)
            else value
            for key, value in row.items()
        }
        for row in rows
    ]  # fmt: skip


SHARD_FORMS: dict[str, ShardForm] = {"jsonl": JsonLinesForm(), "parquet": ParquetForm()}


@dataclass(frozen=True, kw_only=True)
class ShardChoice:
    """How many images a shard has, and its form; None is the default, or what the run has."""

    num_pictures: int | None = None
    form: str | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_pictures is not None and self.num_pictures < 1:
            raise ConfigError(f"A shard has {self.num_pictures} pictures; it needs 1 or more.")
        if self.form is not None and self.form not in SHARD_FORMS:
            known = " or ".join(SHARD_FORMS)
            raise ConfigError(f"There is no form {self.form!r} of shards: take {known}.")


class RunFolder:
    """The folder of one run. Shard number i holds the records of names[i·n : (i+1)·n], in order."""

    def __init__(
        self, place: ResultPlace, names: Sequence[str], *, pictures_per_shard: int, form: str
    ) -> None:
        """Use `open`, which checks and makes the folder."""
        self.place = place
        self.names = names
        self._size = pictures_per_shard
        self._suffix = form
        self._form = SHARD_FORMS[form]
        self._files = place.names()

    @classmethod
    def open(
        cls,
        place: ResultPlace,
        names: Sequence[str],
        settings: Mapping[str, Any],
        choice: ShardChoice,
        *,
        resume: bool,
    ) -> RunFolder:
        """Begin a run in a new or empty folder, or continue the one in it.

        A run without a shard, as one whose model could not be loaded, is begun anew.

        `settings` are JSON: all that an answer depends on beside the image.

        Raises:
            ConfigError: the folder holds something else, or a run with another list or settings.
        """
        wanted, files = _RunFile.about(names, settings, choice), place.names()
        has_shards = any(name.startswith("part-") for name in files)
        if RUN_FILE in files and (has_shards or resume):
            if not resume:
                raise ConfigError(
                    f"{place} holds a run. Continue it with --resume, or give another folder."
                )
            wanted = _RunFile.read(place).check(wanted, choice, place)
            place.make()
        elif files - {RUN_FILE}:
            raise ConfigError(f"--out is {place}, which holds other files. Give an empty folder.")
        else:
            place.make()
            place.write(RUN_FILE, f"{json.dumps(wanted.content, indent=2)}\n".encode())
        content = wanted.content
        return cls(
            place, names, pictures_per_shard=content["pictures_per_shard"], form=content["form"]
        )

    @property
    def num_shards(self) -> int:
        """How many shards the list has."""
        return -(-len(self.names) // self._size)

    def positions(self, shard: int) -> range:
        """The positions in the list of a shard's images."""
        return range(shard * self._size, min((shard + 1) * self._size, len(self.names)))

    def shard_of(self, position: int) -> int:
        """The shard of the image at this position."""
        return position // self._size

    def file(self, shard: int) -> str:
        """The name of a shard's file; names sort as the list does."""
        return f"part-{shard:08}.{self._suffix}"

    def to_ask(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Each shard that wants answers, with the positions that have none: not yet, or failed.

        Raises:
            ConfigError: a file is not what a run about this list has written.
        """
        self._files = self.place.names()
        for shard in range(self.num_shards):
            positions: Sequence[int] = self.positions(shard)
            if self.file(shard) in self._files:
                positions = [
                    position
                    for position, row in zip(positions, self.read(shard), strict=True)
                    if row["answer"] is None
                ]
            if positions:
                yield shard, positions

    def read(self, shard: int) -> list[dict[str, Any]]:
        """The records of a shard that has been written, in the order of the list.

        Raises:
            ConfigError: they are not those of its images.
        """
        content = self.place.read(self.file(shard))
        try:
            rows = self._form.unpack(content)
            if [row["image"] for row in rows] != self._names_in_file(shard):
                raise ValueError("its pictures are others")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.place}/{self.file(shard)} does not hold this run's shard ({error}). Move "
                "it away, and it is made again."
            ) from None
        return rows

    def _names_in_file(self, shard: int) -> list[str]:
        names = [self.names[position] for position in self.positions(shard)]
        if self._suffix == "parquet":
            return [row["image"] for row in _as_utf8([{"image": name} for name in names])]
        return names

    def write(self, shard: int, rows: Mapping[int, Row]) -> None:
        """Write a shard whole. Positions that are not in `rows` keep the records in its file."""
        name, positions = self.file(shard), self.positions(shard)
        kept: Iterable[Row] = self.read(shard) if name in self._files else []
        merged = {**dict(zip(positions, kept, strict=False)), **rows}
        self.place.write(name, self._form.pack([merged[position] for position in positions]))
        self._files.add(name)


@dataclass(frozen=True)
class _RunFile:
    """The content of run.json."""

    content: dict[str, Any]

    @classmethod
    def about(
        cls, names: Sequence[str], settings: Mapping[str, Any], choice: ShardChoice
    ) -> _RunFile:
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
        content = {
            "pictures": len(names),
            "pictures_sha256": digest.hexdigest(),
            "pictures_per_shard": choice.num_pictures or PICTURES_PER_SHARD,
            "form": choice.form or "jsonl",
            "settings": settings,
        }
        return cls(json.loads(json.dumps(content)))

    @classmethod
    def read(cls, place: ResultPlace) -> _RunFile:
        try:
            content = json.loads(place.read(RUN_FILE))
            if not (content["pictures_per_shard"] >= 1 and content["form"] in SHARD_FORMS):
                raise ValueError("it has no shards")
            content["pictures"], content["pictures_sha256"], dict(content["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{place}/{RUN_FILE} is no run of this program ({error}).") from None
        return cls(content)

    def check(self, wanted: _RunFile, choice: ShardChoice, place: ResultPlace) -> _RunFile:
        """This run, if it is the one that is wanted.

        Raises:
            ConfigError: it is about another list, or its answers depend on something else.
        """
        ours, theirs = wanted.content, self.content
        if ours["pictures_sha256"] != theirs["pictures_sha256"]:
            seen = f"{theirs['pictures']} pictures and now {ours['pictures']} were found"
            if ours["pictures"] == theirs["pictures"]:
                seen = f"{theirs['pictures']} pictures and now others were found"
            raise ConfigError(
                f"The run in {place} is about {seen}. Give it the same, or another --out."
            )
        given = {"pictures_per_shard": choice.num_pictures, "form": choice.form}
        pairs = {
            **{key: (theirs[key], value) for key, value in given.items() if value is not None},
            **{
                key: (theirs["settings"].get(key), ours["settings"].get(key))
                for key in sorted(ours["settings"].keys() | theirs["settings"].keys())
            },
        }
        for key, (before, now) in pairs.items():
            if before != now:
                raise ConfigError(
                    f"The run in {place} has {key} {before!r:.80}, and now it is {now!r:.80}. "
                    "Give the same, or another --out."
                )
        return self
