"""The writing of a model folder: complete and under its name, or not at all.

Owns   the temporary folder, the swap at the end, the files beside the weights, and a full disk.
Takes  the path of the new folder; gives a place to write it, or writes tensors in memory.
Never  leaves a half model, and never deletes a folder that is not a model folder.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minigpt4_runtime.checkpoint.blank_model import ModelWeight, blank_model, list_weights
from minigpt4_runtime.checkpoint.config_file import CONFIG_NAME
from minigpt4_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourceRecord,
    read_manifest,
)
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF
from minigpt4_runtime.checkpoint.weights import WeightForm, check_shapes, list_some, show_bytes
from minigpt4_runtime.checkpoint.writer import (
    NamedWeight,
    total_bytes,
    write_bytes,
    write_text,
    write_weights,
)
from minigpt4_runtime.config import DTypeName, ModelConfig
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.new_folder import new_folder

TOKENIZER_NAME = "tokenizer.model"
# The disk is full, or the user's quota is used up.
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
# Room for the files beside the weights.
_SMALL_FILES_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that may be replaced: `read` raises a CheckpointError for any other."""

    name: str
    marker: str
    read: Callable[[Path], object]


MODEL_FOLDER = FolderKind("model", MANIFEST_NAME, read_manifest)


def write_folder(  # noqa: PLR0913 - all that a folder is made of.
    out_dir: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer_path: Path,
    *,
    dtype: DTypeName | None = None,
    formats: FormatChoice = DENSE.name,
    sources: tuple[SourceRecord, ...] = (),
    force: bool = False,
    pack: Callable[[ModelWeight, Tensor], dict[str, Tensor]] = ModelWeight.pack,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write a model. `tensors` has the names of MiniGPT4Model.state_dict(), and may read each late.

    They are floats, and packed as `formats` has it, by `pack` in the model's order. Without `dtype`
    each keeps its own. `on_bytes` gets the bytes that are written so far, and their total.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape or of a dtype that a model
            folder does not hold; `out_dir` exists and `force` is not given; the disk is full.
    """
    check_target(out_dir, force=force)
    weights = list(list_weights(blank_model(config, formats=formats)))
    forms = _list_forms(weights, tensors, dtype)
    packed = (
        NamedWeight(name, weight.name, part)
        for weight in weights
        for name, part in pack(weight, tensors[weight.name].detach()).items()
    )
    num_bytes, num_written = total_bytes(forms), 0

    def count(more: int) -> None:
        nonlocal num_written
        num_written += more
        on_bytes(num_written, num_bytes)

    with staged_folder(out_dir, needed_bytes=num_bytes, force=force) as folder:
        write_weights(folder, forms, packed, on_bytes=count)
        manifest = Manifest.stamp(forms.values(), sources, formats)
        write_descriptions(folder, config, manifest, tokenizer_path)


def _list_forms(
    weights: Sequence[ModelWeight], tensors: Mapping[str, Tensor], dtype: DTypeName | None
) -> dict[str, WeightForm]:
    """The form of each tensor to write, after a check that they are the model's."""
    shapes, found, own_dtypes = {weight.name: weight.shape for weight in weights}, {}, {}
    # One pass: `tensors` may compute a tensor at each access.
    for name, tensor in tensors.items():
        found[name], own_dtypes[name] = tuple(tensor.shape), tensor.dtype
    check_shapes("The model to write", shapes, found, remedy="Give the model's state_dict().")
    strange = [name for name in shapes if own_dtypes[name] not in DTYPE_NAME_OF]
    if strange and dtype is None:
        kinds = sorted({str(own_dtypes[name]).removeprefix("torch.") for name in strange})
        raise CheckpointError(
            f"The model to write: {list_some(strange)} of dtype {list_some(kinds)}; float32, "
            "float16 and bfloat16 are known. Say in which dtype it shall be written."
        )
    return {
        name: WeightForm(part.shape, part.dtype or dtype or DTYPE_NAME_OF[own_dtypes[weight.name]])
        for weight in weights
        for name, part in weight.parts().items()
    }


def write_descriptions(
    folder: Path, config: ModelConfig, manifest: Manifest, tokenizer_path: Path
) -> None:
    """Write the files beside the weights, the manifest last."""
    write_bytes(folder / TOKENIZER_NAME, tokenizer_path.read_bytes())
    write_text(folder / CONFIG_NAME, json.dumps(config.to_mapping(), indent=2) + "\n")
    write_text(folder / MANIFEST_NAME, manifest.encode())


def check_target(out_dir: Path, *, force: bool, kind: FolderKind = MODEL_FOLDER) -> None:
    """Make sure that a folder of that kind may be written to `out_dir`.

    Raises:
        CheckpointError: nothing may be written there, or something is there and it is of another
            kind or `force` is not given.
    """
    check_above(out_dir)
    target = out_dir.resolve()
    if not os.path.lexists(out_dir):
        return
    if not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} exists and is not a folder. Choose another --out.")
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(
            f"{out_dir} is the folder that you are in, and cannot be replaced under you. Give "
            "--out the name of a new folder in it."
        )
    if os.path.ismount(target):
        raise CheckpointError(
            f"{out_dir} is where a disk or a volume begins, and cannot be replaced. Give --out the "
            "name of a new folder in it."
        )
    if not any(out_dir.iterdir()):
        return
    try:
        kind.read(out_dir)
    except CheckpointError:
        raise CheckpointError(
            f"{out_dir} exists and is not a {kind.name} folder (it has no {kind.marker} of "
            "one), so it is never replaced. Choose another --out."
        ) from None
    if not force:
        raise CheckpointError(
            f"{out_dir} is a {kind.name} folder already. Choose another --out, or replace it with "
            "--force."
        )


def check_above(path: Path) -> None:
    """Make sure that something may be written to `path`, and folders made on the way to it.

    Raises:
        CheckpointError: it may not.
    """
    target = path.resolve()
    # A root has no parents, and a folder that may not be searched shows no files.
    above = next((each for each in target.parents if os.path.lexists(each)), target)
    if not above.is_dir():
        raise CheckpointError(f"{above} is no folder, and {path} lies in it. Choose another --out.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"Nothing can be written in {above}. Choose another --out.")


@contextmanager
def staged_folder(
    out_dir: Path, *, needed_bytes: int, force: bool, kind: FolderKind = MODEL_FOLDER
) -> Iterator[Path]:
    """Give an empty folder beside `out_dir`, which becomes `out_dir` when the block ends well.

    If the block ends with any error, Ctrl-C too, nothing new is left.

    Raises:
        CheckpointError: `out_dir` may not be written, or the disk is full.
    """
    check_target(out_dir, force=force, kind=kind)
    target = out_dir.resolve()
    # The name is new each time: the folder of a killed process is not in the way.
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with new_folder(target.parent):
            try:
                _check_room(staging, target, needed_bytes, kind)
                staging.mkdir()
                yield staging
                _swap_in(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CheckpointError(
                _describe_full_disk(staging, target, needed_bytes, kind)
            ) from None
        raise CheckpointError(
            f"{out_dir} cannot be written: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}. Choose another --out."
        ) from None


def _swap_in(staging: Path, target: Path) -> None:
    """Put the finished folder in place, then delete the old one."""
    aside = staging.with_suffix(".replaced")
    try:
        if target.exists():
            target.rename(aside)
        staging.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, on systems that can open a folder."""
    if os.name != "posix":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_room(staging: Path, target: Path, needed_bytes: int, kind: FolderKind) -> None:
    free = shutil.disk_usage(target.parent).free
    missing = needed_bytes + _SMALL_FILES_BYTES - free
    if missing > 0:
        seen = f", and {show_bytes(free)} are free: {show_bytes(missing)} are missing"
        raise CheckpointError(_describe_full_disk(staging, target, needed_bytes, kind, seen))


def _describe_full_disk(
    staging: Path, target: Path, needed_bytes: int, kind: FolderKind, seen: str = ""
) -> str:
    left_behind = sorted(
        path.name for path in target.parent.glob(f".{target.name}.*.partial") if path != staging
    )
    hint = f" An interrupted run left {', '.join(left_behind)} there." if left_behind else ""
    return (
        f"The disk of {target.parent} has no room: the {kind.name} needs "
        f"{show_bytes(needed_bytes + _SMALL_FILES_BYTES)}{seen}. Free some space, or choose "
        f"another --out.{hint}"
    )
