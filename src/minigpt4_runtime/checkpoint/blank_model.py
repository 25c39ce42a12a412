"""The model's form without its weights, to be filled from a folder or to be asked for shapes.

Owns   the building of a model on the meta device, where a weight takes no memory.
Takes  a ModelConfig and a group of ranks; gives modules whose weights are shapes alone.
Never  draws a random number: the model's modules leave their weights empty.
"""

import torch

from minigpt4_runtime.checkpoint.weights import Shape
from minigpt4_runtime.config import LanguageConfig, ModelConfig
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.model.parallel import Group


def blank_model(config: ModelConfig, group: Group | None = None) -> MiniGPT4Model:
    """A model on the meta device, in eval mode, whose weights want no gradient."""
    with torch.device("meta"):
        model = MiniGPT4Model(config, group)
    return model.requires_grad_(False).eval()


def blank_language(config: LanguageConfig, group: Group) -> Llama:
    """The same of a language model alone."""
    with torch.device("meta"):
        language = Llama(config, group)
    return language.requires_grad_(False).eval()


def blank_vision(config: ModelConfig) -> VisionPart:
    """The same of an image side alone."""
    with torch.device("meta"):
        vision = VisionPart(config)
    return vision.requires_grad_(False).eval()


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The name and shape of every weight of the model."""
    return {name: tuple(weight.shape) for name, weight in blank_model(config).state_dict().items()}
