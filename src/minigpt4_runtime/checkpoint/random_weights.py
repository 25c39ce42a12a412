"""A model of any shape with random weights, made in memory: for measuring without weights.

Owns   the draw. Each weight is drawn in its dtype and on its device, and packed in its format.
Takes  modules on the meta device; fills them, so that they compute finite nonsense.
Never  touches a file.
"""

import math
from typing import TypeVar, Unpack

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.blank_model import ModelWeight, Where, list_parts, list_weights
from minigpt4_runtime.checkpoint.joining import make_room
from minigpt4_runtime.checkpoint.load import refuse_too_large
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.model.linear import settle

_PACKED_ROWS = 256
M = TypeVar("M", bound=nn.Module)


def fill_at_random(module: M, *, seed: int = 0, **where: Unpack[Where]) -> M:
    """Give a module all its weights. The same seed gives the same ones on the same kind of device.

    Raises:
        BackendUnavailableError: they take more than `free_bytes`, where that is known.
    """
    device, dtype, free_bytes = where["device"], where["dtype"], where.get("free_bytes")
    parts = list_parts(module).values()
    refuse_too_large("This shape", parts, dtype, device=device, free_bytes=free_bytes)
    generator = torch.Generator(device).manual_seed(seed)
    weights = make_room(module, device=device, dtype=dtype) if where.get("joins") else {}
    for each in list_weights(module):
        count = _repeats(each)
        shape = (each.shape[0] // count, *each.shape[1:])
        drawn = _draw(each.name, torch.empty(shape, device=device, dtype=dtype), generator)
        along_outputs = {name: part.split[0] for name, part in each.parts().items()}
        for name, part in each.pack(drawn).items():
            dim = along_outputs[name]
            whole = part if count == 1 or dim is None else torch.cat([part] * count, dim)
            weights[name] = weights[name].copy_(whole) if name in weights else whole
    module.load_state_dict(weights, strict=True, assign=True)
    settle(module)
    return module


def _repeats(weight: ModelWeight) -> int:
    """How often the same rows follow: packing rounds them, which takes longer than drawing."""
    if weight.weight_format is None or weight.weight_format is DENSE:
        return 1
    count, rest = divmod(weight.shape[0], _PACKED_ROWS)
    return 1 if rest else max(count, 1)


def _draw(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a matrix so that rows keep their size through it; norms and biases do nothing."""
    if weight.ndim == 1:
        return weight.fill_(0.0 if name.endswith("bias") else 1.0)
    # Variance 1 / width: a product of rows of unit variance has unit variance again.
    bound = math.sqrt(3 / weight.shape[-1])
    return weight.uniform_(-bound, bound, generator=generator)
