"""The record of how a model folder was made: manifest.json.

Owns   the Manifest: the program that made the folder, its sources, and the form of its weights.
Takes  a model folder; gives its Manifest, or writes one.
Never  looks at a weight.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from minigpt4_runtime import __version__
from minigpt4_runtime.checkpoint.file_kind import read_versioned_json
from minigpt4_runtime.checkpoint.weights import DTYPE_CODES, WeightForm
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.contracts import StoredDTypeName
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import WEIGHT_FORMATS, FormatChoice, unknown_format

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class SourceRecord:
    """One file that a model was made from. `role` is the part it was used for, as in "vision"."""

    role: str
    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, role: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> Self:
        """Read a file through and note its size and digest; `on_bytes` gets the size of each read.

        Raises:
            CheckpointError: the file cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    if on_bytes is not None:
                        on_bytes(len(chunk))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
        return cls(role, path.name, size, digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json. `dtypes` are those of its weights; `made_by` has a version."""

    format_version: int = FORMAT_VERSION
    made_by: str
    dtypes: tuple[StoredDTypeName, ...]
    weight_format: FormatChoice = DENSE.name
    sources: tuple[SourceRecord, ...] = ()

    @classmethod
    def stamp(
        cls,
        forms: Iterable[WeightForm],
        sources: tuple[SourceRecord, ...],
        weight_format: FormatChoice = DENSE.name,
    ) -> Self:
        """A manifest made by this program, now, for weights of these forms."""
        return cls(
            dtypes=tuple(sorted({form.dtype for form in forms})),
            sources=sources,
            weight_format=weight_format,
            made_by=f"minigpt4-runtime {__version__}",
        )

    def encode(self) -> str:
        """The content of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of manifest.json; ValueError, KeyError or TypeError if it is none."""
        weight_format = values.get("weight_format", DENSE.name)
        if not isinstance(values["dtypes"], list) or not isinstance(weight_format, (str, dict)):
            raise TypeError(values)
        manifest = cls(
            dtypes=tuple(values["dtypes"]),
            sources=tuple(SourceRecord(**source) for source in values["sources"]),
            weight_format=weight_format,
            made_by=values["made_by"],
            format_version=values["format_version"],
        )
        if not manifest.dtypes or not set(manifest.dtypes) <= DTYPE_CODES.keys():
            raise ValueError(manifest.dtypes)
        return manifest


def read_manifest(model_dir: Path) -> Manifest:
    """Read a model folder's manifest.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of this program made it.
    """
    path = model_dir / MANIFEST_NAME
    values = read_versioned_json(path, FORMAT_VERSION)
    try:
        manifest = Manifest.from_mapping(values)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} is not the manifest of a MiniGPT-4 model folder. Convert the model again."
        ) from None
    if (unknown := unknown_format(manifest.weight_format)) is not None:
        raise CheckpointError(
            f"{path}: the weights are in the format {unknown!r}, which this program "
            f"does not read (known: {', '.join(WEIGHT_FORMATS)}). Update minigpt4-runtime."
        )
    return manifest
