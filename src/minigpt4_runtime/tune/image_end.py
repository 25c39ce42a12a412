"""The end of the image side, which may learn: kept features → rows for the language model.

Owns   the projection, and the Q-Former where it learns too; both in float32.
Takes  a model folder in any format; gives a module with the names of the model's image side.
Never  has the tower: what it makes of a picture is kept on the disk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.adapter import PROJECTION, QFORMER, read_projection
from minigpt4_runtime.checkpoint.blank_model import blank_model, list_weights
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.qformer import QFormer


class ImageEnd(nn.Module):
    """Its names are those of the image side: "projection.weight", "qformer.layers.0. …"."""

    def __init__(self, config: ModelConfig, *, with_qformer: bool) -> None:
        super().__init__()
        self.qformer: QFormer | None = None
        if with_qformer:
            assert config.qformer is not None, "it was looked for before"
            self.qformer = QFormer(config.qformer, config.vision.hidden_size)
        self.projection = Linear(config.projection_width, config.language.hidden_size, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """(N, R, W) features, or (N, P, C) rows of the tower before a Q-Former → (N, R, hidden)."""
        if self.qformer is not None:
            features = self.qformer(features)
        return self.projection(features)  # type: ignore[no-any-return]


def load_image_end(
    model_dir: Path, *, with_qformer: bool = False, drawn_by: int | None = None
) -> ImageEnd:
    """With a folder's own weights; the projection drawn at random where there is a seed for it.

    Raises:
        CheckpointError: it is no model folder.
    """
    weight, bias = read_projection(model_dir)
    if drawn_by is not None:
        weight, bias = draw_projection((weight.shape[0], weight.shape[1]), drawn_by)
    weights = {f"{PROJECTION}.weight": weight, f"{PROJECTION}.bias": bias}
    if with_qformer:
        weights |= _read_qformer(model_dir)
    with torch.device("meta"):
        end = ImageEnd(load_config(model_dir), with_qformer=with_qformer)
    own = {name.removeprefix("vision."): tensor for name, tensor in weights.items()}
    end.load_state_dict(own, strict=True, assign=True)
    return end


def _read_qformer(model_dir: Path) -> dict[str, Tensor]:
    """All of it, in float32, to be written to."""
    stored = read_folder_weights(model_dir)
    model = blank_model(load_config(model_dir), formats=read_manifest(model_dir).weight_format)
    weights = {}
    for each in list_weights(model):
        if each.name.startswith(f"{QFORMER}."):
            found = map_tensors({name: stored[name] for name in each.parts()})
            stem = each.name.removesuffix("weight")
            parts = {name.removeprefix(stem): tensor for name, tensor in found.items()}
            whole = each.weight_format.unpack(parts) if each.weight_format else found[each.name]
            weights[each.name] = whole.to(torch.float32, copy=True)
    return weights


def draw_projection(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A projection (out, in) at random, as torch begins one: ±1/√in, evenly."""
    generator = torch.Generator().manual_seed(seed)
    bound = shape[1] ** -0.5
    weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)
