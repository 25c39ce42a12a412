"""The model's form without its weights, to be filled from a folder or to be asked for shapes.

Owns   the building of a model on the meta device, where a weight takes no memory.
Takes  a ModelConfig; gives a MiniGPT4Model whose weights are shapes alone.
Never  draws a random number: the model's modules leave their weights empty.
"""

import torch

from minigpt4_runtime.checkpoint.weights import Shape
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model


def blank_model(config: ModelConfig) -> MiniGPT4Model:
    """A model on the meta device, in eval mode, whose weights want no gradient."""
    with torch.device("meta"):
        model = MiniGPT4Model(config)
    return model.requires_grad_(False).eval()


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The name and shape of every weight of the model."""
    return {name: tuple(weight.shape) for name, weight in blank_model(config).state_dict().items()}
