"""Published weight files: the only module that opens a pickle. It never runs one.

Owns   the opening of .pth, .bin and .safetensors files, and a sentence for each failure.
Takes  paths; gives tensors in the mapped file, under the file's own names.
Never  copies a weight: a page is read at its first use, and a mapping ends with its last tensor.
"""

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.file_kind import is_safetensors, read_head, refuse_text
from minigpt4_runtime.checkpoint.mapped import FLOATS_WANTED, map_tensors
from minigpt4_runtime.checkpoint.weights import list_some, read_header
from minigpt4_runtime.convert.legacy_pickle import PASSED_OVER, Inert, is_legacy, load_legacy
from minigpt4_runtime.convert.wrapping import unwrap
from minigpt4_runtime.errors import CheckpointError

_ZIP_START = b"PK\x03\x04"
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# The errors of torch.load and its weights_only unpickler for damaged or other files.
_LOAD_ERRORS = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    OSError, OverflowError, MemoryError,
)  # fmt: skip
_GLOBAL_NAME = re.compile(r"(?:GLOBAL|global|class) '?([\w.]+)")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Open a published weight file; the tensors lie in the mapped file until they are dropped.

    Raises:
        CheckpointError: the file is something else, damaged, or wants to run code.
    """
    head = read_head(path)
    if path.suffix == ".safetensors":
        refuse_text(path, head)
        return map_tensors(read_header(path))
    return _named_tensors(path, _open_pickle(path, head))


def read_settings(path: Path) -> Mapping[str, object]:
    """The settings of the model that a training program kept beside its weights, if it did.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    if path.suffix == ".safetensors":
        return {}
    content = _open_pickle(path, read_head(path))
    for key in ("config", "model"):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _open_pickle(path: Path, head: bytes) -> object:
    if is_legacy(head):
        return _load_pickle(path, load_legacy)
    if not head.startswith(_ZIP_START):
        refuse_text(path, head)
        raise CheckpointError(f"{path} {_describe_stranger(head)}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is cut off: its end is missing, so the download did not finish. "
            "Download it again."
        )
    if not _is_torch_archive(path):
        raise CheckpointError(
            f"{path} is a zip archive that torch did not write. Unpack it, and give what is in it."
        )
    return _load_pickle(path, _load_zip)


def _describe_stranger(head: bytes) -> str:
    if is_safetensors(head):
        return "is a safetensors file; give it a name that ends in .safetensors."
    if head.startswith(_PICKLE_STARTS):
        return (
            "is a pickle that torch did not write. Open it where you trust it, and save its "
            "tensors with torch.save."
        )
    return (
        f"is no weight file: it begins with {head[:8].hex(' ')}, a weight file with 50 4b 03 04. "
        "Download it again; if it is an archive, unpack it first."
    )


def _is_torch_archive(path: Path) -> bool:
    """Whether torch wrote this zip. Its index of tensors is read, which checks that part's sum."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            for name in pickles:
                archive.read(name)
            return bool(pickles)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download it again.") from None


def _load_zip(path: Path) -> object:
    with torch.serialization.safe_globals([(Inert, name) for name in PASSED_OVER]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_pickle(path: Path, load: Callable[[Path], object]) -> object:
    try:
        return load(path)
    except pickle.UnpicklingError as error:
        found = _GLOBAL_NAME.search(str(error))
        if found is None:
            raise CheckpointError(
                f"{path} is damaged: its list of tensors makes no sense. Download it again."
            ) from None
        raise CheckpointError(
            f"{path} wants to run code while it is opened ({found[1]}); a weight file holds only "
            "tensors, so it was not opened. Take the published file, or save its tensors alone."
        ) from None
    except _LOAD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path} is damaged ({reason}). Download it again.") from None


def _named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """Keep the tensors, wherever they stand beside optimiser and settings."""
    content = unwrap(content, Tensor)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not named tensors. Take the published file."
        )
    tensors = {
        str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors (only {list_some(str(name) for name in content) or 'nothing'}"
            "). Take the published file."
        )
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise CheckpointError(f"{path}: {list_some(sparse)} are sparse. {FLOATS_WANTED}")
    return tensors
