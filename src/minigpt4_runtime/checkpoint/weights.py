"""Weights at rest: the tensors of a safetensors file and their places, read from its header.

Owns   the reading of headers and of a folder's index, and the check of names and shapes.
Takes  paths; gives StoredTensors: dtype, shape and place in a file. A WeightForm describes a tensor
       that has not been written yet.
Never  reads a weight itself, and loads no torch: `minigpt4 inspect` must answer at once.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import read_head, read_json
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.contracts import StoredDTypeName

TensorShape = tuple[int, ...]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_CODES: dict[StoredDTypeName, str] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The format's own limit; a larger number means that the first bytes are something else.
_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies: `num_bytes` from `start` in the file at `path`.

    Of a weight cut along its inputs, each row lies `row_step` bytes behind the one before.
    `is_part` says that it was cut at all.
    """

    path: Path
    dtype_code: str
    shape: TensorShape
    start: int
    num_bytes: int
    row_step: int | None = None
    is_part: bool = False

    def runs(self) -> Iterator[tuple[int, int]]:
        """The stretches of the file that hold the weight: (start, bytes), in order."""
        if self.row_step is None:
            yield self.start, self.num_bytes
            return
        for row in range(self.shape[0]):
            yield self.start + row * self.row_step, self.num_bytes // self.shape[0]


def cut(stored: StoredTensor, dimension: int, part: range) -> StoredTensor:
    """A part of a weight: some of its rows (dimension 0), or of its columns (1)."""
    shape = (*stored.shape[:dimension], len(part), *stored.shape[dimension + 1 :])
    item_bytes = stored.num_bytes // math.prod(stored.shape[: dimension + 1])
    return replace(
        stored,
        shape=shape,
        start=stored.start + part.start * item_bytes,
        num_bytes=math.prod(shape[: dimension + 1]) * item_bytes,
        row_step=stored.num_bytes // shape[0] if dimension else None,
        is_part=True,
    )


@dataclass(frozen=True)
class WeightForm:
    """What one tensor is, or will be, in a model folder."""

    shape: TensorShape
    dtype: StoredDTypeName

    @property
    def num_bytes(self) -> int:
        """Its size in a file and in memory."""
        return math.prod(self.shape) * ITEM_BYTES[DTYPE_CODES[self.dtype]]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors that a safetensors file lists, in the order in which they lie there.

    Raises:
        CheckpointError: the file is damaged, or shorter than its header says.
    """
    return read_described(path)[0]


def read_described(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The same, and what the file says of itself. See `read_header`."""
    read_head(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        length = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else size
        if length > min(_LONGEST_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is no safetensors file, or cut off. Take it again.")
        text = file.read(length)
    try:
        entries = json.loads(text)
        tensors = {
            name: _read_entry(path, entry, 8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        metadata = {str(name): str(text) for name, text in entries.get("__metadata__", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has a damaged header. Take the file again.") from None
    wanted = max((t.start + t.num_bytes for t in tensors.values()), default=8 + length)
    if size != wanted:
        state = "cut off" if size < wanted else "damaged"
        raise CheckpointError(
            f"{path} is {state}: it has {size} bytes and its header speaks of {wanted}. "
            "Take the file again."
        )
    return dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata


def _read_entry(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    code, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    num_bytes = last - first
    if first < 0 or num_bytes < 0 or any(size < 0 for size in shape):
        raise ValueError(entry)
    if code in ITEM_BYTES and num_bytes != ITEM_BYTES[code] * math.prod(shape):
        raise ValueError(entry)
    return StoredTensor(path, code, shape, data_start + first, num_bytes)


def list_indexed_files(index_path: Path) -> tuple[Path, ...]:
    """Give the files that an index names, in order; all of them must be there.

    Raises:
        CheckpointError: the index is damaged, or files that it names are missing.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} names no weights. Take the file again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A name that leads out of the folder is not a file of this model.
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index_path} names {name!r}, which is not a plain file name.")
    missing = [name for name in names if not (index_path.parent / name).is_file()]
    if missing:
        verb, noun = ("is", "file") if len(missing) == 1 else ("are", "files")
        raise CheckpointError(
            f"{index_path} names {list_some(missing)}, which {verb} not there. "
            f"Download the missing {noun} into that folder."
        )
    return tuple(index_path.parent / name for name in names)


def read_folder_weights(model_dir: Path) -> dict[str, StoredTensor]:
    """Read the headers of all of a model folder's weight files.

    Raises:
        CheckpointError: a file is missing or damaged, or a weight stands in two files.
    """
    index_path = model_dir / INDEX_NAME
    paths = list_indexed_files(index_path) if index_path.exists() else (model_dir / SINGLE_NAME,)
    weights: dict[str, StoredTensor] = {}
    for path in paths:
        for name, stored in read_header(path).items():
            if name in weights:
                raise CheckpointError(
                    f"{name} stands both in {weights[name].path} and in {path}. Convert again."
                )
            weights[name] = stored
    return weights


def check_shapes(
    owner: Path | str,
    expected: Mapping[str, TensorShape],
    found: Mapping[str, TensorShape],
    *,
    remedy: str,
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: a weight is missing, too many or of another shape; the message ends with
            `remedy`.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{owner}: {count(missing, 'weight')} missing ({list_some(missing)}). {remedy}"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise CheckpointError(
            f"{owner}: {count(extra, 'weight')} too many ({list_some(extra)}). {remedy}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{owner}: {name} is {show_shape(found[name])}; the model needs "
                f"{show_shape(shape)}. {remedy}"
            )


def list_some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    known = list(names)
    rest = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + rest


def count(names: Iterable[object], noun: str) -> str:
    """A number with its noun: "1 weight", "2 weights"."""
    number = len(list(names))
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_shape(shape: TensorShape) -> str:
    """A shape for people: 64×160."""
    return "×".join(str(size) for size in shape) or "a single number"


def show_bytes(number: int) -> str:
    """A size for people, in powers of 1024: 13.5 GiB."""
    size = float(number)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
