"""A model folder → a model that can compute, with one copy of each weight and none to spare.

Owns   the strict match of a folder's weights against the model, and the ways into memory.
Takes  a model folder, a device and a dtype; gives a MiniGPT4Model in eval mode.
Never  guesses: a missing weight, one too many or one of another shape is an error by name.
"""

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
)
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model

__all__ = ["load_config", "load_model", "read_tensor"]

_PIECE_BYTES = 16 * 2**20


def load_model(model_dir: Path, *, device: torch.device, dtype: torch.dtype) -> MiniGPT4Model:
    """Load a model. Weights that lie in `dtype` already stay in the mapped file on a CPU.

    Raises:
        CheckpointError: a file is damaged, or a weight is missing, too many or misshapen.
        ConfigError: config.json holds something that cannot work.
    """
    config = load_config(model_dir)
    read_manifest(model_dir)
    stored = read_folder_weights(model_dir)
    model = blank_model(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: weight.shape for name, weight in stored.items()}
    check_shapes(model_dir, shapes, found, remedy="Convert the model again.")
    _refuse_other_dtypes(model_dir, stored)
    weights = dict(_place_weights(stored, device, dtype))
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
        flat[first : first + len(piece)].copy_(piece)
        first += len(piece)
    return tensor


def _place_weights(
    stored: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    lying = {
        name: place
        for name, place in stored.items()
        if device.type == "cpu" and TORCH_DTYPES[place.dtype_code] == dtype
    }
    yield from map_tensors(lying).items()
    coming = {name: place for name, place in stored.items() if name not in lying}
    # One buffer for all: freed between them, each would leave a hole that no weight fills.
    buffer = _make_buffer(coming.values())
    for name, place in coming.items():
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


def _refuse_other_dtypes(model_dir: Path, stored: Mapping[str, StoredTensor]) -> None:
    strange = [name for name, place in stored.items() if place.dtype_code not in TORCH_DTYPES]
    if strange:
        codes = sorted({stored[name].dtype_code for name in strange})
        raise CheckpointError(
            f"{model_dir}: {list_some(strange)} of dtype {list_some(codes)}; float32, float16 and "
            "bfloat16 are known. Convert the model again."
        )
