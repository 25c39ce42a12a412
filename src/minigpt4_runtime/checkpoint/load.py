"""A model folder → a model that can compute, keeping exactly one copy of each weight.

Owns   the strict match of a folder's weights against the model, and their reading or mapping.
Takes  a model folder, a device, a dtype for its floats, a group of ranks and the kernels of the
       formats; gives modules in eval mode.
Never  guesses: a missing weight, one too many or one of another shape is an error by name.
"""

import ctypes
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.adapters import adapted, lay_adapter_over
from minigpt4_runtime.checkpoint.blank_model import (
    KernelOf,
    Side,
    Where,
    blank_for,
    blank_model,
    dtype_of,
    list_parts,
)
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.joining import make_room
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import TORCH_DTYPES, map_tensors
from minigpt4_runtime.checkpoint.reading import Reader
from minigpt4_runtime.checkpoint.weights import (
    DTYPE_CODES,
    StoredTensor,
    check_shapes,
    cut,
    read_folder_weights,
    show_bytes,
)
from minigpt4_runtime.config import DTYPE_NAMES, ModelConfig
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.formats.contracts import Part
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.model.parallel import Group, Solo, share, split_dimension

_LANGUAGE = "language."


@dataclass(frozen=True)
class _Folder:
    """The checked content of a model folder: exactly the model's weights, and their parts."""

    path: Path
    config: ModelConfig
    formats: FormatChoice
    stored: Mapping[str, StoredTensor]
    parts: Mapping[str, Part]


def load_model(
    model_dir: Path,
    config: ModelConfig | None = None,
    *,
    adapter: Path | None = None,
    **where: Unpack[Where],
) -> MiniGPT4Model:
    """Load a model. On a CPU, weights of the wanted dtype and order stay in the mapped file.

    `config` takes the place of the folder's own, for settings that change no shape; with an
    `adapter` it is that of `adapters.adapted`. A projection of the adapter takes the place of the
    folder's, and its LoRA stands beside the weights.

    Raises:
        CheckpointError: a file is damaged, or a weight is missing, too many or misshapen.
        ConfigError: config.json holds something that cannot work.
        BackendUnavailableError: the weights take more than `free_bytes`, where that is known.
    """
    folder = _open(model_dir, config, adapter)
    return _fill(blank_for(where, folder.config, folder.formats), "", folder, where)


def load_language(
    model_dir: Path,
    config: ModelConfig | None = None,
    *,
    adapter: Path | None = None,
    **where: Unpack[Where],
) -> Llama:
    """Load this rank's part of the language model alone. See `load_model`."""
    folder = _open(model_dir, config, adapter)
    language = blank_for(where, folder.config, folder.formats).language
    return _fill(language, _LANGUAGE, folder, where)


def load_vision(
    model_dir: Path, *, dtype: torch.dtype, kernel_of: KernelOf | None = None
) -> VisionPart:
    """Load the image side alone, on the CPU. See `load_model`."""
    folder, where = _open(model_dir), Where(device=torch.device("cpu"), dtype=dtype)
    if kernel_of is not None:
        where["kernel_of"] = kernel_of
    vision = blank_for(where, folder.config, folder.formats).vision
    return _fill(vision, "vision.", folder, where)


def _open(
    model_dir: Path, config: ModelConfig | None = None, adapter: Path | None = None
) -> _Folder:
    config = config or adapted(load_config(model_dir), adapter, model_dir)
    formats: FormatChoice = read_manifest(model_dir).weight_format
    stored = read_folder_weights(model_dir)
    if adapter is not None:
        stored, formats = lay_adapter_over(adapter, model_dir, config, stored, formats)
    parts = list_parts(blank_model(config, formats=formats))
    wanted = {name: part.shape for name, part in parts.items()}
    found = {name: place.shape for name, place in stored.items()}
    check_shapes(model_dir, wanted, found, remedy="Convert the model again.")
    for name, part in parts.items():
        code, known = stored[name].dtype_code, (part.dtype,) if part.dtype else DTYPE_NAMES
        if code not in [DTYPE_CODES[each] for each in known]:
            raise CheckpointError(
                f"{model_dir}: {name} of dtype {code}; {' or '.join(known)} is wanted. Convert the "
                "model again."
            )
    return _Folder(model_dir, config, formats, stored, parts)


def _place_for(group: Group, folder: _Folder, name: str) -> StoredTensor:
    """Where this rank's part of a tensor lies; of the image side and of norms, all of it."""
    place = folder.stored[name]
    weight_dimension = split_dimension(name) if name.startswith(_LANGUAGE) else None
    if group.size == 1 or weight_dimension is None:
        return place
    dimension = folder.parts[name].split[weight_dimension]
    if dimension is None:
        return place
    return cut(place, dimension, share(place.shape[dimension], group))


def _fill(module: Side, prefix: str, folder: _Folder, where: Where) -> Side:
    device, dtype, group = where["device"], where["dtype"], where.get("group") or Solo()
    parts = list_parts(module)
    # In the order of the files, which are then read from start to end.
    stored = {
        name.removeprefix(prefix): _place_for(group, folder, name)
        for name in folder.stored
        if name.startswith(prefix)
    }
    dtypes = {name: dtype_of(part, dtype) for name, part in parts.items()}
    arranged = {
        f"{name}.": each
        for name, each in module.named_modules()
        if isinstance(each, Linear) and each.wanted_order is not None
    }
    stays = device.type == "cpu" and not where.get("joins")
    moved = {name + part for name, each in arranged.items() for part in each.part_names}
    mapped = {
        name: place
        for name, place in stored.items()
        if stays and name not in moved and _may_stay_mapped(place, dtypes[name])
    }
    copied = [name for name in stored if name not in mapped]
    refuse_too_large(
        str(folder.path), (parts[name] for name in copied), dtype,
        device=device, free_bytes=where.get("free_bytes"),
    )  # fmt: skip
    room = make_room(module, device=device, dtype=dtype) if where.get("joins") else {}
    with Reader((stored[name] for name in copied), device) as reader:

        def read(name: str) -> Tensor:
            tensor = room.get(name)
            if tensor is None:
                tensor = torch.empty(stored[name].shape, device=device, dtype=dtypes[name])
            return read_into(tensor, stored[name], reader)

        weights = map_tensors(mapped) | {name: read(name) for name in copied if name not in moved}
        # Of these, one at a time is there twice.
        for name, linear in arranged.items():
            linear.settle({part: read(name + part) for part in linear.part_names})
            weights |= {name + part: linear.get_parameter(part) for part in linear.part_names}
    module.load_state_dict(weights, strict=True, assign=True)
    if arranged:
        _give_back_freed_memory()
    return module


def _give_back_freed_memory() -> None:
    """Give back what lies freed between tensors that stay: with glibc a fifth of the model."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _may_stay_mapped(place: StoredTensor, dtype: torch.dtype) -> bool:
    return (
        TORCH_DTYPES[place.dtype_code] == dtype
        and place.start % dtype.itemsize == 0
        # A mapped part would keep the huge pages that it shares with its neighbours.
        and not place.is_part
    )


def refuse_too_large(
    what: str,
    parts: Iterable[Part],
    dtype: torch.dtype,
    *,
    device: torch.device,
    free_bytes: int | None,
) -> None:
    """Check that tensors fit into the free memory, if that is known.

    Raises:
        BackendUnavailableError: they do not; the message begins with `what`.
    """
    needed_bytes = sum(math.prod(part.shape) * dtype_of(part, dtype).itemsize for part in parts)
    if free_bytes is not None and needed_bytes > free_bytes:
        raise BackendUnavailableError(
            f"{what} takes {show_bytes(needed_bytes)} in {str(dtype).removeprefix('torch.')}, "
            f"and {device} has {show_bytes(free_bytes)} free. Load it in a smaller dtype, or on "
            "another device."
        )


def read_tensor(stored: StoredTensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read one weight from its file, piece by piece, into a tensor of its own."""
    with Reader([stored], device) as reader:
        return read_into(torch.empty(stored.shape, device=device, dtype=dtype), stored, reader)


def read_into(tensor: Tensor, stored: StoredTensor, reader: Reader) -> Tensor:
    """Fill a contiguous tensor by a reader, which many weights can share.

    It is filled at the end of the reader's `with`.
    """
    flat, first = tensor.view(-1), 0
    for piece in reader.pieces(stored):
        _refuse_overflow(stored.path, piece, tensor.dtype)
        reader.send(piece, flat[first : first + len(piece)])
        first += len(piece)
    return tensor


def _refuse_overflow(path: Path, piece: Tensor, dtype: torch.dtype) -> None:
    if piece.dtype == dtype:
        return
    limit = torch.finfo(dtype).max
    if torch.finfo(piece.dtype).max > limit and float(piece.abs().max()) > limit:
        raise CheckpointError(
            f"{path} holds a weight of {float(piece.abs().max()):g}, more than "
            f"{str(dtype).removeprefix('torch.')} can. Load the model in bfloat16 or float32."
        )
