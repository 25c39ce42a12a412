"""A model folder → a model that can compute, with one copy of each weight and none to spare.

Owns   the strict match of a folder's weights against the model, and the ways into memory.
Takes  a model folder, a device, a dtype and a group of ranks; gives modules in eval mode.
Never  guesses: a missing weight, one too many or one of another shape is an error by name.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.blank_model import (
    blank_language,
    blank_model,
    blank_vision,
    model_shapes,
)
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import TORCH_DTYPES, map_tensors
from minigpt4_runtime.checkpoint.weights import (
    StoredTensor,
    check_shapes,
    cut,
    list_some,
    read_folder_weights,
    show_bytes,
)
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.model.parallel import Group, Solo, share, split_dimension

__all__ = [
    "load_config", "load_language", "load_model", "load_vision", "read_tensor", "refuse_too_large",
]  # fmt: skip

_LANGUAGE = "language."
_VISION = "vision."

_PIECE_BYTES = 16 * 2**20


def load_model(
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free_bytes: int | None = None,
    group: Group | None = None,
) -> MiniGPT4Model:
    """Load a model. Weights that lie in `dtype` already stay in the mapped file on a CPU.

    Of a group's weights this rank's part alone is read, and copied.

    Raises:
        CheckpointError: a file is damaged, or a weight is missing, too many or misshapen.
        ConfigError: config.json holds something that cannot work.
        BackendUnavailableError: the weights take more than `free_bytes`, where that is known.
    """
    config, stored = _open(model_dir)
    _fill(
        model := blank_model(config, group), _cut_language(stored, group or Solo()), model_dir,
        device=device, dtype=dtype, free_bytes=free_bytes,
    )  # fmt: skip
    return model


def load_language(
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free_bytes: int | None = None,
    group: Group,
) -> Llama:
    """Load this rank's part of the language model alone. See `load_model`."""
    config, stored = _open(model_dir)
    mine = _below(_LANGUAGE, _cut_language(stored, group))
    _fill(
        language := blank_language(config.language, group), mine, model_dir,
        device=device, dtype=dtype, free_bytes=free_bytes,
    )  # fmt: skip
    return language


def load_vision(model_dir: Path, *, dtype: torch.dtype) -> VisionPart:
    """Load the image side alone, on the CPU. See `load_model`."""
    config, stored = _open(model_dir)
    _fill(
        vision := blank_vision(config), _below(_VISION, stored), model_dir,
        device=torch.device("cpu"), dtype=dtype, free_bytes=None,
    )  # fmt: skip
    return vision


def _below(prefix: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {
        name.removeprefix(prefix): place
        for name, place in stored.items()
        if name.startswith(prefix)
    }


def _open(model_dir: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """A folder's config, and its weights, which are all there and no others."""
    config = load_config(model_dir)
    read_manifest(model_dir)
    stored = read_folder_weights(model_dir)
    found = {name: weight.shape for name, weight in stored.items()}
    check_shapes(model_dir, model_shapes(config), found, remedy="Convert the model again.")
    _refuse_other_dtypes(model_dir, stored)
    return config, stored


def _cut_language(stored: Mapping[str, StoredTensor], group: Group) -> dict[str, StoredTensor]:
    """All weights, those of the language model cut to this rank's part."""
    parts = dict(stored)
    if group.size > 1:
        for name, place in stored.items():
            dimension = split_dimension(name) if name.startswith(_LANGUAGE) else None
            if dimension is not None:
                parts[name] = cut(place, dimension, share(place.shape[dimension], group))
    return parts


def _fill(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free_bytes: int | None,
) -> None:
    mapped, copied = _split(stored, device, dtype)
    refuse_too_large(
        str(model_dir), (math.prod(place.shape) for place in copied.values()), dtype,
        device=device, free_bytes=free_bytes,
    )  # fmt: skip
    weights = {**map_tensors(mapped), **dict(_read_weights(copied, device, dtype))}
    module.load_state_dict(weights, strict=True, assign=True)


def refuse_too_large(
    what: str,
    counts: Iterable[int],
    dtype: torch.dtype,
    *,
    device: torch.device,
    free_bytes: int | None,
) -> None:
    """Check that so many numbers a weight fit into what is free, where that is known.

    Raises:
        BackendUnavailableError: they do not; the message begins with `what`.
    """
    needed_bytes = sum(counts) * dtype.itemsize
    if free_bytes is not None and needed_bytes > free_bytes:
        raise BackendUnavailableError(
            f"{what} takes {show_bytes(needed_bytes)} in {str(dtype).removeprefix('torch.')}, "
            f"and {device} has {show_bytes(free_bytes)} free. Load it in a smaller dtype, or on "
            "another device."
        )


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
        if device.type == "cpu"
        and TORCH_DTYPES[place.dtype_code] == dtype
        # Mapped, a part would take the huge pages that it shares with its neighbours.
        and not place.is_part
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
    dtype, view, filled = TORCH_DTYPES[stored.dtype_code], buffer.numpy().data, 0
    # Unbuffered, or each row of a part would read into its neighbour's.
    with stored.path.open("rb", buffering=0) as file:
        for start, left in stored.runs():
            file.seek(start)
            while left:
                num_bytes = min(left, len(view) - filled)
                if file.readinto(view[filled : filled + num_bytes]) != num_bytes:
                    raise CheckpointError(f"{stored.path} was cut off while it was read.")
                left, filled = left - num_bytes, filled + num_bytes
                if filled == len(view):
                    yield buffer.view(dtype)
                    filled = 0
    if filled:
        yield buffer[:filled].view(dtype)


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
