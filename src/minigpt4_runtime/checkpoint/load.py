"""A model folder → a model that can compute, with one copy of each weight and none to spare.

Owns   the strict match of a folder's weights against the model, and the ways into memory.
Takes  a model folder, a device and a dtype; gives a MiniGPT4Model in eval mode.
Never  guesses: a missing weight, one too many or one of another shape is an error by name.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.source import TORCH_DTYPES, map_tensors
from minigpt4_runtime.checkpoint.weights import (
    StoredTensor,
    check_shapes,
    list_some,
    read_folder_weights,
    show_bytes,
)
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model

__all__ = ["load_config", "load_model", "read_tensor"]

_PIECE_BYTES = 16 * 2**20


def load_model(
    model_dir: Path, *, device: torch.device, dtype: torch.dtype, free_bytes: int | None = None
) -> MiniGPT4Model:
    """Load a model. Weights that lie in `dtype` already stay in the mapped file on a CPU.

    Raises:
        CheckpointError: a file is damaged, or a weight is missing, too many or misshapen.
        ConfigError: config.json holds something that cannot work.
        BackendUnavailableError: the weights take more than `free_bytes`, where that is known.
    """
    config = load_config(model_dir)
    read_manifest(model_dir)
    stored = read_folder_weights(model_dir)
    model = blank_model(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: weight.shape for name, weight in stored.items()}
    check_shapes(model_dir, shapes, found, remedy="Convert the model again.")
    _refuse_other_dtypes(model_dir, stored)
    mapped, copied = _split(stored, device, dtype)
    needed_bytes = sum(math.prod(place.shape) for place in copied.values()) * dtype.itemsize
    if free_bytes is not None and needed_bytes > free_bytes:
        raise BackendUnavailableError(
            f"{model_dir} takes {show_bytes(needed_bytes)} in {str(dtype).removeprefix('torch.')}, "
            f"and {device} has {show_bytes(free_bytes)} free. Load it in a smaller dtype, or on "
            "another device."
        )
    weights = {**map_tensors(mapped), **dict(_read_weights(copied, device, dtype))}
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def read_tensor(
    stored: StoredTensor, *, device: torch.device, dtype: torch.dtype, buffer: Tensor | None = None
) -> Tensor:
    """Read one weight from its file, piece by piece, into a tensor of its own.

    `buffer` are bytes to read through; who reads many weights makes one for all.
    """
    if buffer is None:
        buffer = _make_buffer([stored])
    tensor = torch.empty(stored.shape, device=device, dtype=dtype)
    flat, first = tensor.view(-1), 0
    for piece in _read_pieces(stored, buffer):
        _refuse_overflow(stored.path, piece, dtype)
        flat[first : first + len(piece)].copy_(piece)
        first += len(piece)
    return tensor


def _split(
    stored: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The weights that may stay in the mapped files, and those that must be copied."""
    mapped = {
        name: place
        for name, place in stored.items()
        if device.type == "cpu" and TORCH_DTYPES[place.dtype_code] == dtype
    }
    return mapped, {name: place for name, place in stored.items() if name not in mapped}


def _read_weights(
    copied: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    # One buffer for all: freed between them, each would leave a hole that no weight fills.
    buffer = _make_buffer(copied.values())
    for name, place in copied.items():
        yield name, read_tensor(place, device=device, dtype=dtype, buffer=buffer)


def _make_buffer(stored: Iterable[StoredTensor]) -> Tensor:
    largest = max((place.num_bytes for place in stored), default=0)
    return torch.empty(min(_PIECE_BYTES, largest), dtype=torch.uint8)


def _read_pieces(stored: StoredTensor, buffer: Tensor) -> Iterator[Tensor]:
    """Read plainly, not through a mapping: mapped pages would count beside the new tensor."""
    dtype, view = TORCH_DTYPES[stored.dtype_code], buffer.numpy().data
    left = stored.num_bytes
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while left:
            num_bytes = min(left, len(view))
            if file.readinto(view[:num_bytes]) != num_bytes:
                raise CheckpointError(f"{stored.path} was cut off while it was read.")
            yield buffer[:num_bytes].view(dtype)
            left -= num_bytes


def _refuse_overflow(path: Path, piece: Tensor, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if torch.finfo(piece.dtype).max > limit and float(piece.abs().max()) > limit:
        raise CheckpointError(
            f"{path} holds a weight of {float(piece.abs().max()):g}, more than "
            f"{str(dtype).removeprefix('torch.')} can. Load the model in bfloat16 or float32."
        )


def _refuse_other_dtypes(model_dir: Path, stored: Mapping[str, StoredTensor]) -> None:
    strange = [name for name, place in stored.items() if place.dtype_code not in TORCH_DTYPES]
    if strange:
        codes = sorted({stored[name].dtype_code for name in strange})
        raise CheckpointError(
            f"{model_dir}: {list_some(strange)} of dtype {list_some(codes)}; float32, float16 and "
            "bfloat16 are known. Convert the model again."
        )
