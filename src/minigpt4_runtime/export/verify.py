"""Does the graph give the rows that torch gives? Asked before it gets its name.

Owns   the pictures to compare on, torch's rows of them in float32, and the bounds.
Takes  the image side before it is exported, and the graph after; gives a GraphCheck, or an error.
Never  needs both in memory: the rows of the one are kept, and it may go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from minigpt4_runtime.checkpoint.graph_folder import GraphCheck
from minigpt4_runtime.config import DTypeName, VisionConfig
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.optional import require

Array = numpy.ndarray[Any, Any]

INSTALL = "pip install 'minigpt4-runtime[onnx]'"
# Parts of a picture's largest value. In float32 only the order of sums differs.
BOUNDS: dict[str, float] = {"float32": 1e-4, "float16": 2e-2}
_NUM_RANDOM = 2


@dataclass(frozen=True, eq=False)
class Sample:
    """Pixels (N, 3, S, S) and what torch makes of them, (N, R, hidden). Random ones come last."""

    pixels: Array
    rows: Array
    num_random: int


@torch.inference_mode()
def make_sample(
    vision: VisionPart, config: VisionConfig, pictures: Sequence[ImageSource]
) -> Sample:
    """Compute the rows of `pictures`, and of noise as wide as normalised pixels are."""
    shape = (_NUM_RANDOM, 3, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    real = [load_image(picture, config).values for picture in pictures]
    pixels = numpy.concatenate([numpy.stack(real), noise.numpy()]) if real else noise.numpy()
    # One by one: a full tower's rows between its layers take their share of memory.
    rows = [vision(torch.from_numpy(each[None]).float())[0].numpy() for each in pixels]
    return Sample(pixels, numpy.stack(rows), _NUM_RANDOM)


def check_graph(
    path: Path, sample: Sample, dtype: DTypeName, batch_sizes: tuple[int, ...] | None
) -> GraphCheck:
    """Run the graph on a CPU over the sample, all at once where it can.

    Raises:
        CheckpointError: its rows are further from torch's than the bound.
    """
    rows = _run(path, sample.pixels, len(sample.pixels) if batch_sizes is None else batch_sizes[0])
    absolute = numpy.abs(rows - sample.rows).max(axis=(1, 2))
    relative = absolute / numpy.abs(sample.rows).max(axis=(1, 2))
    bound = BOUNDS[dtype]
    check = GraphCheck(
        num_pictures=len(sample.pixels) - sample.num_random,
        num_random=sample.num_random,
        largest_absolute=float(absolute.max()),
        largest_relative=float(relative.max()),
        bound=bound,
    )
    # Not "above the bound": what is no number is above nothing.
    if not check.largest_relative <= bound:
        wider = " Export with --dtype float32." if dtype == "float16" else ""
        raise CheckpointError(
            f"The exported graph's rows differ from torch's by {check.largest_relative:.1e} of the "
            f"largest value; at most {bound:g} is allowed in {dtype}. Nothing was kept.{wider}"
        )
    return check


def _run(path: Path, pixels: Array, batch_size: int) -> Array:
    onnxruntime = require("onnxruntime", install=INSTALL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone: it warns of constants that it cannot fold.
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    missing = -len(pixels) % batch_size
    padded = numpy.concatenate([pixels, pixels[:1].repeat(missing, axis=0)])
    rows = [
        session.run(None, {name: padded[first : first + batch_size]})[0]
        for first in range(0, len(padded), batch_size)
    ]
    return numpy.concatenate(rows)[: len(pixels)].astype(numpy.float32)
