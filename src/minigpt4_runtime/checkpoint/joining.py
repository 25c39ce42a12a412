"""Room for weights that lie one behind the other, so that one product serves them all.

Owns   the empty tensors of each `Joint`, and the views of them that are the parts of its Linears.
Takes  modules on the meta device, as `blank_model` makes them; what loads them fills the views.
Never  copies a weight: what is read goes where it stays.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.blank_model import dtype_of
from minigpt4_runtime.model.linear import Joint, Linear


def make_room(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Join what can be joined; the parts of its weights by their names in the module, empty."""
    names = {each: name for name, each in module.named_modules() if isinstance(each, Linear)}
    room: dict[str, Tensor] = {}
    for joint in module.modules():
        if isinstance(joint, Joint) and joint.is_possible:
            first, sizes = joint.linears[0], [each.shape[0] for each in joint.linears]
            whole = {
                name: torch.empty(part.shape, device=device, dtype=dtype_of(part, dtype))
                for name, part in first.weight_format.parts(sum(sizes), first.shape[1]).items()
            }
            bias = None
            if first.bias is not None:
                bias = torch.empty(sum(sizes), device=device, dtype=dtype)
            joint.hold(whole, bias)
            for linear, last in zip(joint.linears, accumulate(sizes), strict=True):
                for name, tensor in (whole if bias is None else whole | {"bias": bias}).items():
                    own = linear.get_parameter(name)
                    stop = last * len(tensor) // sum(sizes)
                    room[f"{names[linear]}.{name}"] = tensor[stop - len(own) : stop]
    return room
