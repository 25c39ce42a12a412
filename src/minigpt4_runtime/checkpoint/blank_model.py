"""The model without its weights, to be filled from a folder or to be asked for shapes.

Owns   the building of a model on the meta device, where a weight takes no memory; the one walk that
       gives each Linear its format and its kernel, and the list of the parts of each weight.
Takes  a ModelConfig, a group of ranks and a choice of formats; gives modules whose weights are
       shapes alone, and ModelWeights.
Never  draws a random number: the model's modules leave their weights empty.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Required, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.weights import TensorShape
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.formats.contracts import InOrder, LinearKernel, Part, WeightFormat
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice, format_of
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.model.parallel import Group
from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS, RowOperations, use_operations

T = TypeVar("T")
Side = TypeVar("Side", MiniGPT4Model, Llama, VisionPart)
# A format → the kernel for its products on the device where the model will run.
KernelOf = Callable[[WeightFormat], LinearKernel | InOrder]


class Where(TypedDict, total=False):
    """The device of a model, the dtype of its floats, and the kernels of its weights.

    Of a group's weights only this rank's part is held. Without `kernel_of` each format uses its own
    `multiply`, and without `operations` the model has torch's. With `joins`, weights that
    multiply the same rows lie in one tensor (`Joint`), and on a CPU no weight stays in its file.
    """

    device: Required[torch.device]
    dtype: Required[torch.dtype]
    free_bytes: int | None
    group: Group
    kernel_of: KernelOf
    operations: RowOperations
    joins: bool


def blank_model(
    config: ModelConfig,
    group: Group | None = None,
    formats: FormatChoice = DENSE.name,
    kernel_of: KernelOf | None = None,
) -> MiniGPT4Model:
    """A model on the meta device, in eval mode, whose weights have no gradient.

    Raises:
        ConfigError: a format cannot hold a weight, or this rank's part of it.
    """
    with torch.device("meta"):
        model = MiniGPT4Model(config, group)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                chosen = format_of(formats, name)
                module.use(chosen, kernel_of(chosen) if kernel_of else chosen.multiply)
    return model.requires_grad_(False).eval()


def blank_for(where: Where, config: ModelConfig, formats: FormatChoice) -> MiniGPT4Model:
    """The same, for the group, the kernels and the operations in `where`."""
    model = blank_model(config, where.get("group"), formats, where.get("kernel_of"))
    use_operations(model, where.get("operations", TORCH_OPERATIONS))
    return model


@dataclass(frozen=True)
class ModelWeight:
    """A weight as one matrix. Without a format it is one tensor, like that of a norm."""

    name: str
    shape: TensorShape
    weight_format: WeightFormat | None = None

    def parts(self) -> dict[str, Part]:
        """Its parts, by their names in the model and in a folder."""
        if self.weight_format is None:
            return {self.name: Part(self.shape)}
        return self.whole_names(self.weight_format.parts(*self.shape))

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of these parts, from the weight in floats."""
        if self.weight_format is None:
            return {self.name: weight}
        return self.whole_names(self.weight_format.pack(weight))

    def whole_names(self, parts: dict[str, T]) -> dict[str, T]:
        """Parts by their names in the model and in a folder."""
        return {f"{self.name.removesuffix('weight')}{name}": part for name, part in parts.items()}


def dtype_of(part: Part, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a part in a model whose floats have `dtype`."""
    return getattr(torch, part.dtype) if part.dtype else dtype


def list_weights(module: nn.Module) -> Iterator[ModelWeight]:
    """All weights of a model or of a side of it, in their order in its state_dict()."""
    for owner_name, owner in module.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        parts = owner.part_names if isinstance(owner, Linear) else ()
        if isinstance(owner, Linear):
            yield ModelWeight(f"{prefix}weight", owner.shape, owner.weight_format)
        for name, weight in owner.named_parameters(recurse=False):
            if name not in parts:
                yield ModelWeight(f"{prefix}{name}", tuple(weight.shape))


def list_parts(module: nn.Module) -> dict[str, Part]:
    """The parts of all weights of a model or of a side of it."""
    return {name: part for weight in list_weights(module) for name, part in weight.parts().items()}


def model_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """The name and shape of every weight of the model, each as one matrix."""
    return {weight.name: weight.shape for weight in list_weights(blank_model(config))}
