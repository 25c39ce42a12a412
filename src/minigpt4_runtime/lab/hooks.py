"""Functions of a user's that see what a layer computes, and may put something else in its place.

Owns   the places where a function can be put, and their order.
Takes  functions; gives each what is computed at its place, and takes back what it returns.
Never  stays: what is put somewhere is gone at the end of its `with`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor, nn

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.model.llama import Llama, LlamaLayer
from minigpt4_runtime.model.row_operations import Residual

Site = Literal["scores", "heads", "attention", "feed_forward", "residual"]
Layers = Literal["all"] | int | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a function is called: in a pass over rows that begin at the position `start`.

    `branch` is the name of the branch that is computed, "" for the prompt itself.
    """

    site: Site
    layer: int
    start: int
    branch: str


# What is computed at a place → what goes on in its stead, or None to let it be.
#   scores        (B, H, Q, T) before the mask and softmax, for Q rows and the T rows they may see
#   heads         (B, Q, H, D) what each head has gathered, before the product that joins them
#   attention     (B, Q, C)    what attention adds to the rows
#   feed_forward  (B, Q, C)    what the feed-forward adds
#   residual      (B, Q, C)    the rows behind the layer
Hook = Callable[[Tensor, Place], Tensor | None]


class Hooks:
    """All functions that are set, by site and layer, in the order in which they were set."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._set: list[tuple[Site, frozenset[int], Hook]] = []

    @contextmanager
    def adding(self, site: Site, layers: Layers, function: Hook) -> Iterator[None]:
        """Have a function at a site of these layers for a while.

        Raises:
            RequestError: there is no such site or layer.
        """
        if site not in get_args(Site):
            raise RequestError(f"site is {site!r}; it must be one of {', '.join(get_args(Site))}.")
        entry = (site, frozenset(pick(layers, self._num_layers, "layer")), function)
        self._set.append(entry)
        try:
            yield
        finally:
            self._set.remove(entry)

    def at(self, site: Site, layer: int) -> list[Hook]:
        """The functions of a place."""
        return [each for at, layers, each in self._set if at == site and layer in layers]

    def call(self, value: Tensor, place: Place) -> Tensor:
        """The value of a place, as its functions leave it."""
        for function in self.at(place.site, place.layer):
            given = function(value, place)
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.shape != value.shape:
                seen = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise RequestError(
                    f"A hook at {place.site} of layer {place.layer} gave {seen}; it must give None "
                    f"or a tensor of {tuple(value.shape)}, as it got."
                )
            value = given
        return value

    @contextmanager
    def watching(self, language: Llama, num_rows: int, start: int, branch: str) -> Iterator[None]:
        """Call the functions of whole layers during a pass over B sequences of `num_rows` rows."""
        with ExitStack() as stack:
            for index, layer in enumerate(language.layers):
                assert isinstance(layer, LlamaLayer)
                sites: tuple[tuple[Site, nn.Module], ...] = (
                    ("attention", layer.attention),
                    ("feed_forward", layer.mlp_down),
                    ("residual", layer),
                )
                for site, module in sites:
                    if self.at(site, index):
                        place = Place(site, index, start, branch)
                        handle = module.register_forward_hook(self._caller(place, num_rows))
                        stack.callback(handle.remove)
            yield

    def _caller(self, place: Place, num_rows: int) -> Callable[..., Tensor | Residual]:
        def called(_: nn.Module, __: object, given: Tensor | Residual) -> Tensor | Residual:
            packed = given.total if isinstance(given, Residual) else given
            value = self.call(packed.view(-1, num_rows, packed.shape[-1]), place).flatten(0, 1)
            return Residual(value) if isinstance(given, Residual) else value

        return called


def pick(wanted: Layers, count: int, what: str) -> list[int]:
    """The numbers of layers or heads that are meant; -1 is the last.

    Raises:
        RequestError: there is no such number.
    """
    if isinstance(wanted, str):
        if wanted != "all":
            raise RequestError(f"{wanted!r} names no {what}; give 'all', a number or several.")
        return list(range(count))
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise RequestError(
                f"There is no {what} {number!r}: they are 0 to {count - 1}, or from the end -1 to "
                f"-{count}."
            )
    return [number % count for number in numbers]
