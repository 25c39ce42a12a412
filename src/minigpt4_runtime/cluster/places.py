"""What is typed → the names of all images, and a name → the image.

Owns   lists in text files, folders in object stores (fsspec), tables (Parquet), and their names.
Takes  paths and addresses; gives names, each once, and for a name the source that opens it.
Never  opens an image while names are listed: of a table of bytes only the number of rows is read.

A name is a path, an address (https://…, s3://…), or `TABLE.parquet#ROW`, counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from minigpt4_runtime.batch.finding import (
    STDIN,
    find_images,
    hint_of_r,
    is_missing,
    read_place,
    source_of,
)
from minigpt4_runtime.cluster.stores import is_in_store, open_store, told
from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.images.formats import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from minigpt4_runtime.images.pixels import DEFAULT_LIMITS
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.optional import require
from minigpt4_runtime.report.files import read_text

_ROW = re.compile(r"(.+\.parquet)#(\d+)", re.IGNORECASE | re.DOTALL)


def find_names(places: Iterable[str], *, recursive: bool, column: str | None) -> list[str]:
    """The names of all images, each once, in the order of the places; folders are sorted.

    A place is an image, a folder, a list (.txt: a name a line), or a table (.parquet). With a
    `column`, folders are searched for tables.

    Raises:
        ConfigError: a folder holds nothing, or a list or a table cannot be read.
    """
    found: dict[str, None] = {}
    for place in places:
        if place == STDIN:
            raise ConfigError("- is this program's stdin, which no worker has. Name a file.")
        found.update(dict.fromkeys(_names_at(place, recursive=recursive, column=column)))
    if not found:
        raise ConfigError("There are no pictures in what was named. Name others.")
    return list(found)


def _names_at(place: str, *, recursive: bool, column: str | None) -> Iterator[str]:
    suffixes = frozenset({".parquet"}) if column else IMAGE_SUFFIXES | UNREADABLE_SUFFIXES
    members = _members(place, suffixes, recursive=recursive)
    for name in members or [place]:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix == ".parquet":
            yield from _names_in_table(name, column)
        elif suffix == ".txt":
            yield from filter(None, map(str.strip, _text(name).splitlines()))
        else:
            yield name if is_in_store(name) else str(read_place(name))


def _members(place: str, suffixes: frozenset[str], *, recursive: bool) -> list[str]:
    """The files of a folder; none if it is no folder.

    Raises:
        ConfigError: there are none, or it cannot be read.
    """
    if not is_in_store(place):
        path = read_place(place)
        if not (isinstance(path, Path) and path.is_dir()):
            return []
        if suffixes == {".parquet"}:
            pattern = "**/*.parquet" if recursive else "*.parquet"
            members = sorted(map(str, path.glob(pattern)))
        else:
            images = find_images(
                [path], recursive=recursive, with_unreadable=True, hint=hint_of_r(recursive)
            )
            return list(map(str, images))
    elif (found := _members_of_store(place, suffixes, recursive=recursive)) is None:
        return []
    else:
        members = found
    if not members:
        what = "tables (.parquet)" if suffixes == {".parquet"} else "pictures"
        raise ConfigError(f"There are no {what} in the folder {place}. {hint_of_r(recursive)}")
    return members


def _members_of_store(
    address: str, suffixes: frozenset[str], *, recursive: bool
) -> list[str] | None:
    store, folder = open_store(address)
    try:
        if not store.isdir(folder):
            return None
        paths = store.find(folder, maxdepth=None if recursive else 1)
    except Exception as error:  # noqa: BLE001 - each store has errors of its own.
        raise ConfigError(f"{address} cannot be listed ({told(error)}).") from None
    skipped = len(folder.rstrip("/")) + 1
    return sorted(
        store.unstrip_protocol(path)
        for path in paths
        if PurePosixPath(path).suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path[skipped:].split("/"))
    )


def _text(name: str) -> str:
    if not is_in_store(name):
        return read_text(Path(read_place(name)))
    store, path = open_store(name)
    try:
        return str(store.cat_file(path).decode("utf-8-sig"))
    except Exception as error:  # noqa: BLE001 - each store has errors of its own.
        raise ConfigError(f"The list {name} cannot be read ({told(error)}).") from None


def _open_table(name: str) -> Any:
    """A table as pyarrow's ParquetFile."""
    parquet = require("pyarrow.parquet", extra="ray")
    if not is_in_store(name):
        return parquet.ParquetFile(name)
    store, path = open_store(name)
    return parquet.ParquetFile(store.open(path, "rb"))


def _names_in_table(name: str, column: str | None) -> Iterator[str]:
    """The values of a column of text, or a name for each row of a column of images."""
    if column is None:
        raise ConfigError(f"{name} is a table. Name its column of pictures with --column NAME.")
    try:
        with _open_table(name) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                known = ", ".join(schema.names)
                raise ConfigError(f"{name} has no column {column!r}; it has {known}.")
            kind = str(schema.field(column).type)
            if kind in ("string", "large_string"):
                for batch in table.iter_batches(columns=[column]):
                    yield from filter(None, batch.column(0).to_pylist())
            elif kind in ("binary", "large_binary") or kind.startswith("struct<bytes: binary"):
                yield from (f"{name}#{row}" for row in range(table.metadata.num_rows))
            else:
                raise ConfigError(
                    f"The column {column!r} of {name} is of type {kind}. Pictures are bytes, or "
                    "text that names them."
                )
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors.
        raise ConfigError(f"The table {name} cannot be read ({told(error)}).") from None


def sources_of(
    names: Sequence[str], *, folder: Path, column: str | None, allows_local: bool
) -> list[ImageSource | None]:
    """The images by their names; None for a file that is missing.

    Relative paths are read from `folder`. Rows of tables are read now, all else when it is opened.
    """
    content = _rows_of_tables(names, folder, column) if column else {}
    return [
        content[name] if name in content else _source_of(name, folder, allows_local)
        for name in names
    ]


def _rows_of_tables(names: Sequence[str], folder: Path, column: str) -> dict[str, ImageSource]:
    rows: dict[str, list[int]] = {}
    for match in filter(None, map(_ROW.fullmatch, names)):
        rows.setdefault(match[1], []).append(int(match[2]))
    return {
        f"{table}#{row}": picture
        for table, wanted in rows.items()
        for row, picture in _read_rows(table, folder, column, wanted)
    }


def _source_of(name: str, folder: Path, allows_local: bool) -> ImageSource | None:
    if is_in_store(name):
        return ImageSource(partial(_fetch, name), label=name)
    try:
        # In a list, - is the name of a file.
        place = Path(name) if name == STDIN else read_place(name)
        if not isinstance(place, Path):
            return source_of(place, allows_local=allows_local)
        return None if is_missing(folder / place) else ImageSource(folder / place, label=name)
    except (ImageError, ValueError) as error:  # A URL of another machine; a null character.
        return _failing(ImageError(str(error)), name)


def _fetch(address: str) -> bytes:
    """The content of an object; one byte above the limit, so that a larger one is refused."""
    try:
        store, path = open_store(address)
        # By name: s3fs has another argument between the path and these.
        return bytes(store.cat_file(path, start=0, end=DEFAULT_LIMITS.max_bytes + 1))
    except FileNotFoundError:
        raise ImageError(f"{address} does not exist.") from None
    except Exception as error:  # noqa: BLE001 - each store has errors of its own.
        raise ImageError(f"{address} cannot be fetched ({told(error)}).") from None


def _read_rows(
    table: str, folder: Path, column: str, wanted: Sequence[int]
) -> Iterator[tuple[int, ImageSource]]:
    """Rows of a column of images. Only the row groups that hold them are read."""
    left, start = set(wanted), 0
    try:
        with _open_table(table if is_in_store(table) else str(folder / table)) as file:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if not left.isdisjoint(range(start, stop)):
                    values = file.read_row_group(group, columns=[column]).column(0)
                    for row in sorted(left.intersection(range(start, stop))):
                        yield row, _as_source(values[row - start].as_py(), f"{table}#{row}")
                        left.discard(row)
                start = stop
    except Exception as error:  # noqa: BLE001 - each store has errors of its own.
        failure = ImageError(f"The table {table} cannot be read ({told(error)}).")
        yield from ((row, _failing(failure, f"{table}#{row}")) for row in sorted(left))
        return
    for row in sorted(left):
        yield row, _failing(ImageError(f"{table} has no row {row}."), f"{table}#{row}")


def _as_source(value: bytes | dict[str, Any] | None, name: str) -> ImageSource:
    """The content of a cell: bytes, or a dict with them, as in Hugging Face's data sets."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        return _failing(ImageError(f"{name} holds no picture: the cell is empty."), name)
    return ImageSource(content, label=name)


def _failing(error: ImageError, name: str) -> ImageSource:
    """An image that cannot be opened, for this reason."""

    def fail() -> bytes:
        raise error

    return ImageSource(fail, label=name)
