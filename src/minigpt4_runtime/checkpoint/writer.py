"""Weights → safetensors files, in bounded pieces, so that no model has to fit into memory.

Owns   the cut into shards, the header, the cast to each new dtype and the check for NaN and inf.
Takes  named weights one after the other, in the order of their WeightForms.
Never  holds more than one piece of one weight.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import (
    DTYPE_CODES,
    INDEX_NAME,
    SINGLE_NAME,
    WeightForm,
)
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.contracts import StoredDTypeName

# 64 MiB in float32: large enough to be fast, small beside any tower.
CHUNK_ITEMS = 16 * 2**20
MAX_SHARD_BYTES = 4 * 2**30
# Weights begin on a cache line, so that a mapped file can be computed with as it lies.
_ALIGNMENT = 64


@dataclass(frozen=True)
class NamedWeight:
    """A weight to be written. `origin` is its name in messages."""

    name: str
    origin: str
    tensor: Tensor


def total_bytes(forms: Mapping[str, WeightForm]) -> int:
    """How many bytes weights of these forms take in the files."""
    return sum(form.num_bytes for form in forms.values())


def write_weights(
    folder: Path,
    forms: Mapping[str, WeightForm],
    weights: Iterable[NamedWeight],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `weights`, which come in the order of `forms`, and an index when there are shards.

    Raises:
        CheckpointError: a weight holds NaN or inf, or a value that its new dtype cannot hold.
    """
    shards = _cut_into_shards(forms, max_shard_bytes)
    weight_map: dict[str, str] = {}
    coming = iter(weights)
    for number, names in enumerate(shards, start=1):
        file_name = (
            SINGLE_NAME
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        weight_map |= dict.fromkeys(names, file_name)
        with (folder / file_name).open("wb") as file:
            file.write(encode_header({name: forms[name] for name in names}))
            for name in names:
                # No variable holds the weight, so that its file can be closed before the next.
                _write_one(file, next(coming), name, dtype=forms[name].dtype, on_bytes=on_bytes)
            sync(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(forms)}, "weight_map": weight_map}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def rounded_chunks(weight: NamedWeight, dtype: StoredDTypeName) -> Iterator[Tensor]:
    """Give a weight's items in order, in bounded flat pieces of the new dtype, each checked.

    Raises:
        CheckpointError: a piece holds NaN or inf, or a value that `dtype` cannot hold.
    """
    for piece in _pieces(weight.tensor):
        rounded = piece.to("cpu", getattr(torch, dtype))
        if not bool(torch.isfinite(rounded).all()):
            raise CheckpointError(_describe_unfit(weight.origin, piece, dtype))
        yield rounded


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: BinaryIO) -> None:
    """Wait until the disk has what was written: a rename must not outlive its content."""
    file.flush()
    os.fsync(file.fileno())


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file of a few tensors in memory."""
    forms, contents = {}, []
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        dtype = cast(StoredDTypeName, str(own.dtype).removeprefix("torch."))
        forms[name] = WeightForm(tuple(own.shape), dtype)
        contents.append(own.reshape(-1).view(torch.uint8).numpy().tobytes())
    return encode_header(forms, metadata) + b"".join(contents)


def _write_one(
    file: BinaryIO,
    weight: NamedWeight,
    name: str,
    *,
    dtype: StoredDTypeName,
    on_bytes: Callable[[int], None],
) -> None:
    assert weight.name == name, f"{weight.name} came where {name} was announced"
    for chunk in rounded_chunks(weight, dtype):
        content = chunk.view(torch.uint8).numpy()
        file.write(content.data)
        on_bytes(content.nbytes)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat pieces of at most CHUNK_ITEMS, in order; only a tensor that lies crosswise is copied."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), CHUNK_ITEMS)
        return
    items_per_row = max(1, tensor.numel() // len(tensor))
    for rows in torch.split(tensor, max(1, CHUNK_ITEMS // items_per_row)):
        yield rows.reshape(-1)


def _describe_unfit(origin: str, piece: Tensor, dtype: StoredDTypeName) -> str:
    if not bool(torch.isfinite(piece).all()):
        kind = "NaN" if bool(torch.isnan(piece).any()) else "an infinite value"
        return f"{origin} holds {kind}: the file is damaged. Download it again."
    largest = float(piece.abs().max())
    wider = "with --dtype bfloat16 or without --dtype" if dtype == "float16" else "without --dtype"
    return f"{origin} holds {largest:g}, which {dtype} cannot hold. Convert {wider}."


def _cut_into_shards(forms: Mapping[str, WeightForm], max_shard_bytes: int) -> list[Sequence[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, form in forms.items():
        if form.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= form.num_bytes
    return list(shards)


def encode_header(
    forms: Mapping[str, WeightForm], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file of these tensors, which follow in this order, begins with."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, form in forms.items():
        end = start + form.num_bytes
        entries[name] = {
            "dtype": DTYPE_CODES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
