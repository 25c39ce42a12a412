"""The part of a model that one rank computes with: its language model, and the image side.

Owns   the loading of both sides, and the choice between torch and a compiled graph.
Takes  a WeightSource, a device, a dtype and VisionSettings; gives a RankModel.
Never  runs an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minigpt4_runtime.checkpoint.adapters import AdapterParts
from minigpt4_runtime.checkpoint.blank_model import Where
from minigpt4_runtime.checkpoint.choices import add_choices, tuned_vision
from minigpt4_runtime.checkpoint.graph_folder import find_graph
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import DTypeName, VisionSettings
from minigpt4_runtime.devices.contracts import Capture, DeviceBackend
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.kernels.registry import linear_kernel, row_operations
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.parallel import Group
from minigpt4_runtime.vision.contracts import VisionEncoder
from minigpt4_runtime.vision.registry import vision_encoder


@dataclass(frozen=True)
class RankModel:
    """The language model, and the encoder of its images, which only rank 0 has.

    `tuned` are the encoders of adapters with an image side of their own, by the adapter's number.
    `vision_bytes` is the size of the image side's weights, 0 where a graph has them. `left_bytes`
    of the memory are left for keys and values; None if that is not known.
    """

    language: Llama
    vision: VisionEncoder | None
    vision_bytes: int
    left_bytes: int | None
    tuned: Mapping[int, VisionEncoder] = field(default_factory=dict)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights: "vision", "embedding", "layers" and "head" of the language."""
        return {
            "vision": self.vision_bytes,
            "embedding": _count_bytes(self.language.token_embedding),
            "layers": _count_bytes(self.language.layers),
            "head": _count_bytes(self.language.head),
        }


def open_graph(
    vision: VisionSettings, source: WeightSource, backend: DeviceBackend, dtype: DTypeName
) -> tuple[str, VisionEncoder | None]:
    """The runtime of the image side, and its encoder unless that is torch."""
    if vision.graph is None:
        return "torch", None
    if source.model_dir is None:
        raise ConfigError("A graph belongs to a model folder, not to random weights.")
    given = (source.adapter, *(path for _, path in source.adapters))
    if any(path is not None and AdapterParts.find(path).projection for path in given):
        raise ConfigError(
            "vision_graph and adapter are both given: a graph holds the projection of its own "
            "folder. Leave out one of them."
        )
    graph = find_graph(Path(vision.graph), source.model_dir, runtime=vision.runtime)
    encoder = vision_encoder(graph.runtime)(
        graph.path, graph.batch_sizes,
        device=backend.device, dtype=getattr(torch, dtype), provider=vision.provider,
    )  # fmt: skip
    return graph.runtime, encoder


def load_rank_model(
    source: WeightSource,
    backend: DeviceBackend,
    dtype: DTypeName,
    *,
    group: Group,
    free_bytes: int | None,
    encoder: VisionEncoder | None = None,
    capture: Capture | None = None,
) -> RankModel:
    """Load this rank's part. Without an `encoder`, rank 0 loads the image side too.

    That is captured as graphs where there is a way to `capture`.
    """
    torch_dtype = getattr(torch, dtype)
    widen_from = backend.widen_from(torch_dtype)
    kernel_of = partial(linear_kernel, device=backend.device, widen_from=widen_from)
    where = Where(
        device=backend.device, dtype=torch_dtype, free_bytes=free_bytes, group=group,
        kernel_of=kernel_of, operations=row_operations(backend.device),
        joins=backend.facts.joins,
    )  # fmt: skip
    vision_bytes, tuned = 0, {}
    if encoder is not None or group.rank:
        language = source.load_language(**where)
    else:
        model = source.load_model(**where)
        language, vision_bytes = model.language, _count_bytes(model.vision)
        encode = partial(
            vision_encoder("torch"),
            in_float32=widen_from is not None, capture=capture, rows_dtype=torch_dtype,
        )  # fmt: skip
        encoder = encode(model.vision)
        parts = {
            number: tuned_vision(
                model.vision, source.config, path, _folder(source), **where
            )
            for number, (_, path) in enumerate(source.adapters, 1)
        }  # fmt: skip
        tuned = {number: encode(part) for number, part in parts.items() if part is not None}
        # What was not tuned is the model's own.
        shared = set(model.vision.parameters())
        vision_bytes += sum(
            weight.nbytes
            for part in parts.values()
            for weight in (part.parameters() if part else ())
            if weight not in shared
        )
    paths = [path for _, path in source.adapters]
    added_bytes = (
        add_choices(language, source.config, paths, _folder(source)) if source.adapters else 0
    )
    if free_bytes is not None:
        free_bytes -= vision_bytes + _count_bytes(language) + added_bytes
    return RankModel(language, encoder, vision_bytes, free_bytes, tuned)


def _folder(source: WeightSource) -> Path:
    assert source.model_dir is not None, "adapters belong to a folder"
    return source.model_dir


def _count_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
