"""A tuned projection as a small file, and its place over the weights of its model folder.

Owns   the file's tensors and its record, and the check that it belongs to a folder.
Takes  the projection in float32, and the Q-Former if it was tuned too, and what they were made of;
       gives the places that a model loads from.
Never  changes a model folder. `adapters` knows folders, which may hold such a file and more.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import map_tensors, refuse_not_finite
from minigpt4_runtime.checkpoint.weights import (
    StoredTensor,
    read_described,
    read_folder_weights,
)
from minigpt4_runtime.checkpoint.writer import encode_tensors
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice, format_of

PROJECTION = "vision.projection"
QFORMER = "vision.qformer"
NAMES = (f"{PROJECTION}.weight", f"{PROJECTION}.bias")
# Under this name the record stands in the header of the file.
RECORD = "minigpt4_tuned"
_REMEDY = (
    "Name the file projection.safetensors that `minigpt4 tune` wrote, or a folder that it or PEFT "
    "wrote."
)


def encode_adapter(
    weight: Tensor,
    bias: Tensor,
    record: Mapping[str, Any],
    qformer: Mapping[str, Tensor] | None = None,
) -> bytes:
    """The file's content. `record` says how it was made, and "base" is its folder's digest.

    `qformer` are all weights of a Q-Former that was tuned too, by their names in the model.
    """
    tensors = {**dict(zip(NAMES, (weight, bias), strict=True)), **(qformer or {})}
    return encode_tensors(tensors, described(record))


def described(record: Mapping[str, Any]) -> dict[str, str]:
    """A header's metadata that hold a record."""
    return {RECORD: dumped(record)}


def dumped(record: Mapping[str, Any]) -> str:
    """A record as it stands in a header."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def read_adapter(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Where the tensors of the file lie, and its record.

    Raises:
        CheckpointError: there is no such file, it is none of `minigpt4 tune`, or a number of it is
            not finite.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. {_REMEDY}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not there. {_REMEDY}")
    stored, metadata = read_described(path)
    try:
        record = json.loads(metadata[RECORD])
        base = record["base"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is no adapter of this program. {_REMEDY}") from None
    projection = {name for name in stored if not name.startswith(f"{QFORMER}.")}
    if projection != set(NAMES) or not isinstance(base, str):
        raise CheckpointError(
            f"{path} does not hold {' and '.join(NAMES)}, and at most a Q-Former with them. "
            f"{_REMEDY}"
        )
    refuse_not_finite(stored)
    return stored, record


def check_base(path: Path, record: Mapping[str, Any], model_dir: Path) -> None:
    """Refuse a file that was made over another image side: see `lay_over`."""
    if record["base"] != vision_digest(model_dir):
        raise CheckpointError(
            f"{path} was tuned over the image side of {record.get('model', 'another model')}, and "
            f"that of {model_dir} has another digest. Take the model that it was made from."
        )


def find_record(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in a header; None where this program has written none."""
    try:
        record = json.loads(metadata[RECORD])
        return record if isinstance(record["base"], str) else None
    except (KeyError, TypeError, ValueError):
        return None


def lay_over(
    path: Path, model_dir: Path, stored: Mapping[str, StoredTensor], formats: FormatChoice
) -> tuple[dict[str, StoredTensor], FormatChoice]:
    """The places of a folder's tensors with the adapter's in place of its own, and the formats.

    Raises:
        CheckpointError: the file is no adapter, or was made over another image side.
    """
    tuned, record = read_adapter(path)
    check_base(path, record, model_dir)
    has_qformer = any(name.startswith(f"{QFORMER}.") for name in tuned)
    for part in (PROJECTION, QFORMER) if has_qformer else (PROJECTION,):
        stored = {name: at for name, at in stored.items() if not name.startswith(f"{part}.")}
        if format_of(formats, part) is not DENSE:
            if isinstance(formats, str):
                formats = {"language": formats, "vision": formats}
            formats = {**formats, part: DENSE.name}
    return {**stored, **tuned}, formats


def read_projection(model_dir: Path) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a folder's own projection, in float32, to be written to.

    Raises:
        CheckpointError: it is no model folder.
    """
    stored = read_folder_weights(model_dir)
    names = [name for name in stored if name.startswith(f"{PROJECTION}.")]
    parts = map_tensors({name.removeprefix(f"{PROJECTION}."): stored[name] for name in names})
    bias = parts.pop("bias")
    weight = format_of(read_manifest(model_dir).weight_format, PROJECTION).unpack(parts)
    return weight.to(torch.float32, copy=True), bias.to(torch.float32, copy=True)
