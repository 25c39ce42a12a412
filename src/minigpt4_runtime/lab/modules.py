"""The modules of the laboratory: those of `model`, over the weights that the engine holds.

Owns   a second set of modules whose weights lie in the same memory, and operations with gradients.
Takes  a LoadedModel; gives a MiniGPT4Model in plain torch.
Never  writes to a weight: the engine reads it too, and it may be a mapped file.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.model.row_operations import TorchOperations, use_operations
from minigpt4_runtime.vision.torch import TorchVisionEncoder

Side = TypeVar("Side", Llama, VisionPart)


class PlainOperations(TorchOperations):
    """See `RowOperations`. Nothing is overwritten, and rows of float64 stay in it."""

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperations`."""
        hidden = hidden if added is None else hidden + added
        rows = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        normed = functional.rms_norm(rows, weight.shape, eps=eps)
        return hidden, normed.to(hidden.dtype) * weight


def shared_modules(loaded: LoadedModel) -> MiniGPT4Model:
    """Modules of their own over a loaded model's weights, in plain torch, without gradients yet.

    A side whose weights lie in the order of some kernel is loaded once more, in the order of its
    format. So is the image side where a compiled graph takes its place, in float32.

    Raises:
        RequestError: ranks share the model.
    """
    if loaded.ranks.size > 1:
        raise RequestError("Ranks share this model. Load it without tensor_parallel to study it.")
    model = blank_model(loaded.config)
    use_operations(model.language, PlainOperations())
    _share(model.vision, _in_order(_vision_part(loaded), loaded))
    _share(model.language, _in_order(loaded.rank_model.language, loaded))
    for name, module in loaded.rank_model.language.named_modules():
        if isinstance(module, Linear) and module.choice is not None:
            mine = model.language.get_submodule(name)
            assert isinstance(mine, Linear), "it is the same model"
            mine.choice = module.choice
    return model


def tuned_modules(model: MiniGPT4Model, loaded: LoadedModel, adapter: int) -> MiniGPT4Model:
    """The modules of `shared_modules` with what an adapter has of its own on the image side.

    What was not tuned, and the language model, stay the same modules.
    """
    tuned = loaded.rank_model.tuned.get(adapter)
    if tuned is None:
        return model
    assert isinstance(tuned, TorchVisionEncoder), "a graph goes with no tuned projection"
    untuned, made = _vision_part(loaded), blank_model(loaded.config)
    made.language = model.language
    _share(made.vision, model.vision)
    for name, child in tuned.part.named_children():
        if child is not untuned.get_submodule(name):
            _share(made.vision.get_submodule(name), child)
    return made


def _vision_part(loaded: LoadedModel) -> VisionPart:
    encoder, model_dir = loaded.rank_model.vision, loaded.model_dir
    if isinstance(encoder, TorchVisionEncoder):
        return encoder.part
    assert model_dir is not None, "a graph belongs to a model folder"
    return load_vision(model_dir, dtype=torch.float32).to(loaded.backend.device)


def _in_order(side: Side, loaded: LoadedModel) -> Side:
    """A side whose weights lie as their formats say."""
    linears = [module for module in side.modules() if isinstance(module, Linear)]
    if all(map(_is_in_order, linears)):
        return side
    device, dtype = loaded.backend.device, getattr(torch, loaded.dtype)
    # Whole, for random weights are drawn one after the other.
    whole = loaded.source.load_model(device=device, dtype=dtype)
    if isinstance(side, Llama):
        return whole.language
    widens = loaded.backend.widen_from(dtype) is not None
    return TorchVisionEncoder(whole.vision, in_float32=widens).part


def _is_in_order(linear: Linear) -> bool:
    wanted = linear.weight_format.parts(*linear.shape)
    held = {name: tuple(linear.get_parameter(name).shape) for name in linear.part_names}
    return held == {name: part.shape for name, part in wanted.items()}


def _share(blank: nn.Module, filled: nn.Module) -> None:
    for name, module in filled.named_modules():
        mine = blank.get_submodule(name)
        if isinstance(module, Linear) and isinstance(mine, Linear):
            with torch.device("meta"):
                mine.use(module.weight_format, module.weight_format.multiply)
        for weight_name, weight in module.named_parameters(recurse=False):
            setattr(mine, weight_name, nn.Parameter(weight.detach(), requires_grad=False))
