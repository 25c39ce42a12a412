"""The image side as one ONNX graph: ViT, ln_vision, Q-Former or grouping, and projection.

Owns   the export through torch.onnx, and the folder, which is written atomically.
Takes  a model folder and images; gives a folder with vision.onnx and export.json.
Never  gives a graph that was not compared with torch.
"""

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime import __version__
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import FolderKind, check_target, staged_folder
from minigpt4_runtime.checkpoint.graph_folder import (
    ONNX_NAME,
    RECORD_NAME,
    GraphRecord,
    read_record,
    vision_digest,
)
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.checkpoint.writer import write_text
from minigpt4_runtime.config import DTYPE_BYTES, DTypeName, VisionConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.export.verify import Sample, check_graph, make_sample
from minigpt4_runtime.formats.contracts import LinearKernel, WeightFormat
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.optional import require

INPUT_NAME, OUTPUT_NAME = "pixels", "rows"
# The first with GELU as one operator, which makes ONNX Runtime some 5 % faster on a CPU.
_OPSET = 20
# Hardware compilers support older versions; the towers need at least 17.
_OM_OPSET = 18
GRAPH_FOLDER = FolderKind("graph", RECORD_NAME, read_record)
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """The graph to make. `batch_sizes` has one size, or is None for any number of images.

    `om_batch_sizes` are the sizes of an .om that is compiled from the graph.
    """

    dtype: DTypeName = "float32"
    batch_sizes: tuple[int, ...] | None = (1,)
    om_batch_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the runtimes support the dtype and the sizes."""
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; a graph can be float32 or float16.")
        for sizes in (self.batch_sizes, self.om_batch_sizes):
            if sizes is not None and (not sizes or min(sizes) < 1 or len({*sizes}) < len(sizes)):
                raise ConfigError(
                    f"batch sizes are {sizes}; they must be different whole numbers ≥ 1."
                )

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        return _OPSET if self.om_batch_sizes is None else _OM_OPSET


def export_onnx(
    model_dir: Path,
    out_dir: Path,
    *,
    images: Sequence[ImageSource],
    plan: GraphPlan | None = None,
    force: bool = False,
) -> GraphRecord:
    """Make `out_dir` with the graph, and compare it with torch on `images` and on noise.

    Raises:
        CheckpointError: the model is incomplete, `out_dir` cannot be written, or the graph's rows
            differ too much. No folder is left then.
        BackendUnavailableError: a package of the extra [onnx] is not installed.
    """
    for name in _PACKAGES[1:]:
        require(name, extra="onnx")
    plan = plan or GraphPlan()
    check_target(out_dir, force=force, kind=GRAPH_FOLDER)
    config = load_config(model_dir)
    vision = load_vision(model_dir, dtype=torch.float32, kernel_of=_in_floats)
    sample = make_sample(vision, config.vision, images)
    num_bytes = sum(weight.numel() for weight in vision.parameters()) * DTYPE_BYTES[plan.dtype]
    if plan.dtype == "float16":
        del vision  # The weights are read again in float16: both do not have to fit into memory.
        vision = load_vision(model_dir, dtype=torch.float16, kernel_of=_in_floats)
    with staged_folder(out_dir, needed_bytes=num_bytes, force=force, kind=GRAPH_FOLDER) as folder:
        _write_graph(vision, config.vision, plan, folder / ONNX_NAME)
        del vision
        gc.collect()  # The exporter leaves reference cycles that hold all weights.
        record = _describe(folder, model_dir, plan, sample)
        write_text(folder / RECORD_NAME, record.encode())
    return record


def _in_floats(weight_format: WeightFormat) -> LinearKernel:
    """A product without rounded rows: a graph that rounds parts from torch at every tie."""

    def multiply(rows: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return functional.linear(rows, weight_format.unpack(parts).to(rows.dtype), bias)

    return multiply


class _Graph(nn.Module):
    """The image side for float32 pixels, whatever the dtype of the weights."""

    def __init__(self, vision: VisionPart) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.vision(pixels.to(self.vision.ln_vision.weight.dtype))
        return rows


def _write_graph(vision: VisionPart, config: VisionConfig, plan: GraphPlan, path: Path) -> None:
    is_any = plan.batch_sizes is None
    # Traced with one image, a variable number of images would become a constant.
    num_images = 2 if plan.batch_sizes is None else plan.batch_sizes[0]
    pixels = torch.zeros(num_images, 3, config.image_size, config.image_size)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Graph(vision).eval(),
            (pixels,),
            dynamo=True,
            opset_version=plan.opset,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("pictures")},) if is_any else None,
            verbose=False,
        )
        assert program is not None
        program.save(path)  # Weights above 2 GB go into a second file.


def _describe(folder: Path, model_dir: Path, plan: GraphPlan, sample: Sample) -> GraphRecord:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return GraphRecord(
        vision_digest=vision_digest(model_dir),
        dtype=plan.dtype,
        batch_sizes=plan.batch_sizes,
        om_batch_sizes=plan.om_batch_sizes,
        opset=plan.opset,
        files=files,
        check=check_graph(folder / ONNX_NAME, sample, plan.dtype, plan.batch_sizes),
        versions={name: version(name) for name in _PACKAGES},
        made_by=f"minigpt4-runtime {__version__}",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about optional packages and skipped optimisations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
