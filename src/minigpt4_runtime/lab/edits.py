"""Other weights for a while.

Owns   the exchange of weights in the laboratory's modules, and their return.
Takes  weights by name, as whole matrices of floats; gradients flow to what they were made of.
Never  writes to a weight.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from minigpt4_runtime.checkpoint.weights import TensorShape
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.model.linear import Linear


@contextmanager
def edited(
    model: nn.Module, shapes: Mapping[str, TensorShape], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """For a `with`: compute with these weights in the place of a model's own, which have `shapes`.

    Raises:
        RequestError: there is no such weight, or it has another shape.
    """
    for name, weight in weights.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " Take a name of lab.weights."
            raise RequestError(f"There is no weight {name!r}.{hint}")
        if tuple(weight.shape) != shapes[name]:
            raise RequestError(
                f"{name} is {shapes[name]}; the weight given for it is {tuple(weight.shape)}."
            )
    with ExitStack() as stack:
        for name, weight in weights.items():
            owner_name, _, own_name = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            if isinstance(owner, Linear) and own_name == "weight":
                stack.enter_context(owner.multiplying_by(weight))
            else:
                stack.enter_context(_exchanged(owner, own_name, weight))
        yield


@contextmanager
def _exchanged(owner: nn.Module, name: str, weight: Tensor) -> Iterator[None]:
    """A tensor with a history cannot be a parameter: it stands there as a plain attribute."""
    before = getattr(owner, name)
    delattr(owner, name)
    setattr(owner, name, weight)
    try:
        yield
    finally:
        delattr(owner, name)
        setattr(owner, name, before)
