"""The model's form without its weights, to be filled from a folder or to be asked for shapes.

Owns   the building of a model on the meta device, where a weight takes no memory.
Takes  a ModelConfig; gives a MiniGPT4Model whose weights are shapes alone.
Never  draws a random number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minigpt4_runtime.checkpoint.weights import Shape
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model

# The first three hand themselves to a mode; the others would be called by torch's other ones.
_INITIALISERS = (
    nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_,
    torch.Tensor.normal_, torch.Tensor.uniform_,
)  # fmt: skip


class _WithoutInitialisers(TorchFunctionMode):
    """Skips what torch's modules draw for weights that are never kept.

    On the meta device the first of them would import half of torch's compiler: seconds and 75 MB.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in _INITIALISERS:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def blank_model(config: ModelConfig) -> MiniGPT4Model:
    """A model on the meta device, in eval mode, whose weights want no gradient."""
    with torch.device("meta"), _WithoutInitialisers():
        model = MiniGPT4Model(config)
    return model.requires_grad_(False).eval()


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The name and shape of every weight of the model."""
    return {name: tuple(weight.shape) for name, weight in blank_model(config).state_dict().items()}
