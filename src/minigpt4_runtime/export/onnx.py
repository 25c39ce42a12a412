"""The image side as one ONNX graph: ViT, ln_vision, Q-Former or grouping, and projection.

Owns   the export through torch.onnx, and the folder that appears whole or not at all.
Takes  a model folder and pictures; gives a folder with vision.onnx and export.json.
Never  loads the language model, and never gives a graph that was not run beside torch.
"""

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

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
from minigpt4_runtime.export.verify import INSTALL, Sample, check_graph, make_sample
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.optional import require

INPUT_NAME, OUTPUT_NAME = "pixels", "rows"
# The first with GELU as one operator: in parts, ONNX Runtime takes some 5 % longer on a CPU.
_OPSET = 20
# Compilers for hardware lag behind, and what the towers cannot do without came with 17.
_OM_OPSET = 18
GRAPH_FOLDER = FolderKind("graph", RECORD_NAME, read_record)
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """What to make. Of `batch_sizes` there is one, or None for any number of pictures at once.

    `om_batch_sizes` are what an .om made of it will take.
    """

    dtype: DTypeName = "float32"
    batch_sizes: tuple[int, ...] | None = (1,)
    om_batch_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Only what both runtimes can run."""
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; a graph can be float32 or float16.")
        for sizes in (self.batch_sizes, self.om_batch_sizes):
            if sizes is not None and (not sizes or min(sizes) < 1 or len({*sizes}) < len(sizes)):
                raise ConfigError(
                    f"batch sizes are {sizes}; they must be different whole numbers ≥ 1."
                )

    @property
    def opset(self) -> int:
        """Which version of ONNX's operators to use."""
        return _OPSET if self.om_batch_sizes is None else _OM_OPSET


def export_onnx(
    model_dir: Path,
    out_dir: Path,
    *,
    pictures: Sequence[ImageSource],
    plan: GraphPlan | None = None,
    force: bool = False,
) -> GraphRecord:
    """Make `out_dir` with the graph, and run it on `pictures` and on random ones beside torch.

    Raises:
        CheckpointError: the model is not whole, `out_dir` may not be written, or the graph's rows
            differ too much; nothing is left then.
        BackendUnavailableError: a package of the extra [onnx] is not installed.
    """
    for name in _PACKAGES[1:]:
        require(name, install=INSTALL)
    plan = plan or GraphPlan()
    check_target(out_dir, force=force, kind=GRAPH_FOLDER)
    config = load_config(model_dir)
    vision = load_vision(model_dir, dtype=torch.float32)
    sample = make_sample(vision, config.vision, pictures)
    num_bytes = sum(weight.numel() for weight in vision.parameters()) * DTYPE_BYTES[plan.dtype]
    if plan.dtype == "float16":
        del vision  # Not twice in memory: half as wide it is read anew.
        vision = load_vision(model_dir, dtype=torch.float16)
    with staged_folder(out_dir, needed_bytes=num_bytes, force=force, kind=GRAPH_FOLDER) as folder:
        _write_graph(vision, config.vision, plan, folder / ONNX_NAME)
        del vision
        gc.collect()  # The exporter leaves circles, and in them all weights.
        record = _describe(folder, model_dir, plan, sample)
        write_text(folder / RECORD_NAME, record.encode())
    return record


class _Graph(nn.Module):
    """Pixels are float32 whatever the weights are, so that callers need not know."""

    def __init__(self, vision: VisionPart) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.vision(pixels.to(self.vision.ln_vision.weight.dtype))
        return rows


def _write_graph(vision: VisionPart, config: VisionConfig, plan: GraphPlan, path: Path) -> None:
    is_any = plan.batch_sizes is None
    # Traced with one picture, a number of pictures would be taken for a constant.
    num_pictures = 2 if plan.batch_sizes is None else plan.batch_sizes[0]
    pixels = torch.zeros(num_pictures, 3, config.image_size, config.image_size)
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
        program.save(path)  # Above 2 GB, which is all that one file may have, weights lie beside.


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
    """The exporter speaks of packages that nobody needs and of folding that it leaves out."""
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
