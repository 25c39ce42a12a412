"""A folder with the image side as compiled graphs: its export.json, and the model it belongs to.

Owns   the GraphRecord, the digest that ties a graph to a model folder, and the choice of a file.
Takes  paths; gives a VisionGraph that belongs to the model folder, or an error.
Never  opens a graph itself.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.file_kind import read_versioned_json
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.errors import CheckpointError

RECORD_NAME = "export.json"
ONNX_NAME = "vision.onnx"
OM_NAME = "vision.om"
ATC_NAME = "atc.sh"
VISION = "vision."
FORMAT_VERSION = 1
# By file suffix. An .om is preferred: it exists only on the hardware that it was made for.
_RUNTIME_OF = {".om": "om", ".onnx": "onnx"}
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class GraphCheck:
    """How far the graph's rows were from torch's in float32, when it was exported.

    `largest_relative` is a part of the largest value of an image's rows; `bound` is its limit.
    """

    num_pictures: int
    num_random: int
    largest_absolute: float
    largest_relative: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """What export.json says. `files` has the size in bytes of each file that makes up the ONNX.

    `batch_sizes` are the numbers of images that a graph takes at once; None is any number.
    """

    vision_digest: str
    dtype: DTypeName
    batch_sizes: tuple[int, ...] | None
    om_batch_sizes: tuple[int, ...] | None
    opset: int
    files: Mapping[str, int]
    check: GraphCheck
    versions: Mapping[str, str]
    made_by: str
    format_version: int = FORMAT_VERSION

    def encode(self) -> str:
        """The content of export.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of export.json; ValueError, KeyError or TypeError if it is none."""
        sizes = {
            name: None if values[name] is None else tuple(int(size) for size in values[name])
            for name in ("batch_sizes", "om_batch_sizes")
        }
        files = {str(name): int(size) for name, size in values["files"].items()}
        return cls(**{**values, **sizes, "files": files, "check": GraphCheck(**values["check"])})


@dataclass(frozen=True)
class VisionGraph:
    """A graph to be run: `runtime` is onnx or om, `batch_sizes` as in its record."""

    path: Path
    runtime: str
    batch_sizes: tuple[int, ...] | None


def read_record(graph_dir: Path) -> GraphRecord:
    """Read a folder's export.json.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of this program made it.
    """
    path = graph_dir / RECORD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{graph_dir} is not a folder made by `minigpt4 export vision`: it has no "
            f"{RECORD_NAME}. Check the path."
        )
    values = read_versioned_json(path, FORMAT_VERSION)
    try:
        return GraphRecord.from_mapping(values)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} is not what `minigpt4 export vision` writes. Export again."
        ) from None


def vision_digest(model_dir: Path) -> str:
    """The sha256 of all that the image side computes with: its settings and weights, as stored."""
    settings = load_config(model_dir).to_mapping()
    names = ("vision_config", "qformer_config", "patches_per_row")
    digest = hashlib.sha256(json.dumps({name: settings[name] for name in names}).encode())
    buffer = memoryview(bytearray(_READ_BYTES))
    for name, stored in sorted(read_folder_weights(model_dir).items()):
        if not name.startswith(VISION):
            continue
        digest.update(f"{name} {stored.dtype_code} {stored.shape} ".encode())
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            left = stored.num_bytes
            while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


def find_graph(path: Path, model_dir: Path, *, runtime: str = "auto") -> VisionGraph:
    """The graph at `path`, an exported folder or a file in it, checked to be the model's.

    Raises:
        CheckpointError: there is no such graph, or it was made from other weights.
    """
    graph_dir = path.parent if _names_file(path) else path
    record = read_record(graph_dir)
    for name, size in record.files.items():
        found = (graph_dir / name).stat().st_size if (graph_dir / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{graph_dir / name} {state}. Export again.")
    graph_path = _choose(path, graph_dir, runtime)
    if record.vision_digest != vision_digest(model_dir):
        raise CheckpointError(
            f"{graph_path} was not made from the weights of {model_dir} (they differ in the "
            f"digest of {RECORD_NAME}). Run: minigpt4 export vision --model {model_dir}"
        )
    found_runtime = _RUNTIME_OF[graph_path.suffix]
    sizes = record.om_batch_sizes if found_runtime == "om" else record.batch_sizes
    return VisionGraph(graph_path, found_runtime, sizes)


def runtimes_of(path: Path) -> tuple[str, ...]:
    """The runtimes of the graphs at `path`, an exported folder or a file in it.

    Raises:
        CheckpointError: there is none.
    """
    named = [path] if _names_file(path) else [path / ONNX_NAME, path / OM_NAME]
    found = tuple(_RUNTIME_OF[each.suffix] for each in named if each.is_file())
    if not found:
        raise CheckpointError(f"{path} holds no graph. Make one with `minigpt4 export vision`.")
    return found


def _names_file(path: Path) -> bool:
    """Whether a path names a graph file, even one that is missing."""
    return path.suffix in _RUNTIME_OF and not path.is_dir()


def _choose(path: Path, graph_dir: Path, runtime: str) -> Path:
    named = [path.name] if _names_file(path) else [OM_NAME, ONNX_NAME]
    wanted = [n for n in named if runtime in ("auto", _RUNTIME_OF[Path(n).suffix])]
    if not wanted:
        raise CheckpointError(
            f"{path} is no graph for the runtime {runtime}. Name its folder, or another runtime."
        )
    for name in wanted:
        if (graph_dir / name).is_file():
            return graph_dir / name
    hint = f"Export with --format {_RUNTIME_OF[Path(wanted[0]).suffix]}."
    if (graph_dir / ATC_NAME).is_file():
        hint = f"Run {graph_dir / ATC_NAME} on an Ascend host first."
    raise CheckpointError(f"{graph_dir / wanted[0]} is not there. {hint}")
