"""Stored tensors → torch tensors that lie in the mapped file itself.

Owns   the dtypes that a file and torch share. Takes StoredTensors; gives tensors.
Never  copies a weight: pages are read at their first use, and freed with the tensors.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.weights import DTYPE_CODES, StoredTensor
from minigpt4_runtime.config import DTYPE_NAMES, DTypeName
from minigpt4_runtime.errors import CheckpointError

TORCH_DTYPES = {code: getattr(torch, name) for name, code in DTYPE_CODES.items()}
# The other way, for floats: the dtypes in which published weights can be stored unchanged.
DTYPE_NAME_OF: dict[torch.dtype, DTypeName] = {getattr(torch, name): name for name in DTYPE_NAMES}

FLOATS_WANTED = (
    "Only float32, float16 and bfloat16 weights can be converted: take the files that were "
    "published before quantisation."
)


def map_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Give tensors that lie in the mapped safetensors files themselves.

    A write to one stays private to this process. The mapping ends with its last tensor.

    Raises:
        CheckpointError: a tensor is of a dtype that torch and this program do not share.
    """
    mappings: dict[Path, mmap.mmap] = {}
    tensors = {}
    for name, place in stored.items():
        if place.dtype_code not in TORCH_DTYPES:
            raise CheckpointError(
                f"{place.path}: {name} is of dtype {place.dtype_code}. {FLOATS_WANTED}"
            )
        if place.path not in mappings:
            with place.path.open("rb") as file:
                mappings[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype, mapping = TORCH_DTYPES[place.dtype_code], mappings[place.path]
        flat = map_tensor(mapping, dtype, place.num_bytes // dtype.itemsize, place.start)
        tensors[name] = flat.view(place.shape)
    return tensors


def map_tensor(mapping: mmap.mmap, dtype: torch.dtype, num_items: int, start: int) -> Tensor:
    """A flat tensor in a mapped file. torch maps no empty one."""
    if num_items == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=num_items, offset=start)


def refuse_not_finite(stored: Mapping[str, StoredTensor]) -> None:
    """Read what a training has saved through, for numbers that would spoil every answer.

    Raises:
        CheckpointError: a weight holds NaN or an infinite value.
    """
    for name, place in stored.items():
        if not bool(torch.isfinite(map_tensors({name: place})[name]).all()):
            raise CheckpointError(
                f"{place.path}: {name} holds NaN or an infinite value, so the training had failed "
                "when it was saved. Take an earlier state of it, or train again."
            )


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of a folder, each mapped at its access and closed with its last use."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return map_tensors({name: self._stored[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
