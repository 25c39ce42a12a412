"""The two sides of a model, loaded: what a rank computes with.

Owns   what each side is loaded from, and which of the two is a compiled graph.
Takes  a WeightSource, a device, a dtype and VisionSettings; gives Sides.
Never  runs an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minigpt4_runtime.checkpoint.blank_model import Where
from minigpt4_runtime.checkpoint.graph_folder import find_graph
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import DTypeName, VisionSettings
from minigpt4_runtime.devices.contracts import DeviceBackend
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.kernels.registry import linear_kernel
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.parallel import Group
from minigpt4_runtime.vision.contracts import VisionEncoder
from minigpt4_runtime.vision.registry import vision_encoder


@dataclass(frozen=True)
class Sides:
    """The language model and what encodes pictures for it.

    `vision_bytes` is what the image side's weights take, 0 where a graph has them. `left_bytes` of
    the memory are left for keys and values, where that is known.
    """

    language: Llama
    vision: VisionEncoder
    vision_bytes: int
    left_bytes: int | None

    def weight_bytes(self) -> dict[str, int]:
        """What the weights take: "vision", "embedding", "layers" and "head" of the language."""
        return {
            "vision": self.vision_bytes,
            "embedding": _count_bytes(self.language.token_embedding),
            "layers": _count_bytes(self.language.layers),
            "head": _count_bytes(self.language.head),
        }


def open_graph(
    vision: VisionSettings, source: WeightSource, backend: DeviceBackend, dtype: DTypeName
) -> tuple[str, VisionEncoder | None]:
    """What the image side runs in, and its encoder unless that is torch."""
    if vision.graph is None:
        return "torch", None
    if source.model_dir is None:
        raise ConfigError("A graph belongs to a model folder, not to random weights.")
    graph = find_graph(Path(vision.graph), source.model_dir, runtime=vision.runtime)
    encoder = vision_encoder(graph.runtime)(
        graph.path, graph.batch_sizes,
        device=backend.device, dtype=getattr(torch, dtype), provider=vision.provider,
    )  # fmt: skip
    return graph.runtime, encoder


def load_sides(
    source: WeightSource,
    backend: DeviceBackend,
    dtype: DTypeName,
    *,
    group: Group,
    encoder: VisionEncoder | None,
    free_bytes: int | None,
) -> Sides:
    """Load the language model, and the image side too unless `encoder` is a graph of it."""
    torch_dtype = getattr(torch, dtype)
    widen_from = backend.widen_from(torch_dtype)
    kernel_of = partial(linear_kernel, device=backend.device, widen_from=widen_from)
    where = Where(
        device=backend.device, dtype=torch_dtype, free_bytes=free_bytes, group=group,
        kernel_of=kernel_of,
    )  # fmt: skip
    vision_bytes = 0
    if encoder is not None:
        language = source.load_language(**where)
    else:
        model = source.load_model(**where)
        language, vision_bytes = model.language, _count_bytes(model.vision)
        encoder = vision_encoder("torch")(model.vision, in_float32=widen_from is not None)
    if free_bytes is not None:
        free_bytes -= vision_bytes + _count_bytes(language)
    return Sides(language, encoder, vision_bytes, free_bytes)


def _count_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
