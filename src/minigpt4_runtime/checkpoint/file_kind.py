"""The kind of a file, found by its first bytes before it is parsed.

Owns   the messages about absent files, web pages, Git LFS pointers and half downloads; JSON.
Takes  a path; gives its first bytes, or the mapping that a JSON file holds.
Never  opens a pickle, and loads no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4_runtime.errors import CheckpointError

HEAD_BYTES = 512
# Above this size a file that begins like text may still be binary.
_LONGEST_NOTE_BYTES = 4096
# A torch archive is a zip; older ones are pickles.
_WEIGHT_STARTS = (b"PK\x03\x04", b"\x80")
_WEIGHT_ENDINGS = (".pth", ".bin", ".pt", ".safetensors")
_WEB_PAGE_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


def read_head(path: Path) -> bytes:
    """Give a file's first bytes, after a check that it is not a stand-in for the real file.

    Raises:
        CheckpointError: the file is absent, empty, a folder, a web page or a Git LFS pointer.
    """
    if path.is_dir():
        refuse_adapter(path)
        raise CheckpointError(f"{path} is a folder; a file is wanted here.")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Check the path, or download it.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    if not head:
        raise CheckpointError(f"{path} is empty: the download did not finish. Download it again.")
    if is_lfs_pointer(head):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its "
            "repository, or download the file."
        )
    if is_web_page(head):
        raise CheckpointError(
            f"{path} is a web page saved in place of the file: the link led to a page about it. "
            "Download the file itself."
        )
    return head


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is HTML or XML."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE_STARTS)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is what Git keeps in place of a large file."""
    return head.startswith(b"version https://git-lfs")


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is a safetensors file: JSON after eight bytes."""
    return head[8:9] == b"{"


def begins_as_named(name: str, head: bytes) -> bool:
    """Whether a file that begins so can be what its name says: weights, a tokenizer or JSON.

    Of other names nothing is known.
    """
    if name.endswith(_WEIGHT_ENDINGS):
        return head.startswith(_WEIGHT_STARTS) or is_safetensors(head)
    if name.endswith("tokenizer.model"):
        # The first piece, in Protocol Buffers' form.
        return head.startswith(b"\x0a")
    return not name.endswith(".json") or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def refuse_text(path: Path, head: bytes) -> None:
    """Refuse a short text in place of weights, such as a server's error message.

    Raises:
        CheckpointError: the file is such a text; the message shows how it begins.
    """
    if path.stat().st_size <= _LONGEST_NOTE_BYTES and head.isascii():
        text = head.decode("ascii").strip()
        if text.replace("\n", " ").isprintable():
            raise CheckpointError(
                f"{path} holds a text, not weights: {text[:80]!r}. Download the file again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds named values.

    Raises:
        CheckpointError: the file is absent, a stand-in, or no JSON object.
    """
    read_head(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Take the file again from where it came from."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; named values are wanted.")
    return values


def show_value(values: Mapping[str, Any], name: str) -> str:
    """A value as its JSON file has it, cut short; "absent" where it has none."""
    return json.dumps(values[name])[:80] if name in values else "absent"


def as_number(value: object) -> object:
    """The number that a text or a decimal stands for ("4096", 4096.0), or the value itself."""
    if isinstance(value, str):
        try:
            value = float(value) if not value.strip().isdecimal() else int(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder of peft's: an adapter of a model, and not the model.

    Raises:
        CheckpointError: it is one.
    """
    path = folder / "adapter_config.json"
    if path.is_file():
        base = show_value(read_json(path), "base_model_name_or_path")
        raise CheckpointError(
            f"{folder} is a PEFT adapter ({path.name}, base model {base}), not a whole model. "
            "Merge it into its base model with peft's merge_and_unload, save that, and give its "
            "folder."
        )


def read_versioned_json(path: Path, newest_version: int) -> dict[str, Any]:
    """Read a JSON file whose `format_version` says which programs can read it.

    Raises:
        CheckpointError: as `read_json`, or a newer version of this program made it.
    """
    values = read_json(path)
    version = values.get("format_version")
    if isinstance(version, int) and version > newest_version:
        raise CheckpointError(
            f"{path} is of format version {version} and this program reads up to "
            f"{newest_version}. Update minigpt4-runtime."
        )
    return values
