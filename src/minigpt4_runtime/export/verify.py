"""The comparison of a graph's rows with torch's, before the graph is published.

Owns   the images to compare on, torch's rows of them in float32, and the bounds.
Takes  the image side before the export and the graph after it; gives a GraphCheck, or an error.
       Only torch's rows are kept, so that both need not be in memory.
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

# Shares of an image's largest value. In float32 only the order of sums differs.
BOUNDS: dict[str, float] = {"float32": 1e-4, "float16": 2e-2}
_NUM_RANDOM = 2


@dataclass(frozen=True, eq=False)
class Sample:
    """Pixels (N, 3, S, S) and torch's rows for them, (N, R, hidden). Random images come last."""

    pixels: Array
    rows: Array
    num_random: int


@torch.inference_mode()
def make_sample(vision: VisionPart, config: VisionConfig, images: Sequence[ImageSource]) -> Sample:
    """Compute the rows of `images`, and of noise with the spread of normalised pixels."""
    shape = (_NUM_RANDOM, 3, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    real = [load_image(each, config).values for each in images]
    pixels = numpy.concatenate([numpy.stack(real), noise.numpy()]) if real else noise.numpy()
    # One by one, to save memory for the rows between the tower's layers.
    rows = [vision(torch.from_numpy(each[None]).float())[0].numpy() for each in pixels]
    return Sample(pixels, numpy.stack(rows), _NUM_RANDOM)


def check_graph(
    path: Path, sample: Sample, dtype: DTypeName, batch_sizes: tuple[int, ...] | None
) -> GraphCheck:
    """Run the graph on a CPU over the sample, in one batch if the graph allows.

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
    # Written so that NaN fails: NaN is not above any bound.
    if not check.largest_relative <= bound:
        wider = " Export with --dtype float32." if dtype == "float16" else ""
        raise CheckpointError(
            f"The exported graph's rows differ from torch's by {check.largest_relative:.1e} of the "
            f"largest value; at most {bound:g} is allowed in {dtype}. Nothing was kept.{wider}"
        )
    return check


def _run(path: Path, pixels: Array, batch_size: int) -> Array:
    onnxruntime = require("onnxruntime", extra="onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Only errors: it warns about constants that it cannot fold.
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    missing = -len(pixels) % batch_size
    padded = numpy.concatenate([pixels, pixels[:1].repeat(missing, axis=0)])
    rows = [
        session.run(None, {name: padded[first : first + batch_size]})[0]
        for first in range(0, len(padded), batch_size)
    ]
    return numpy.concatenate(rows)[: len(pixels)].astype(numpy.float32)
