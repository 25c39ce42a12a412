"""One language model over several ranks (Shoeybi et al., 2019, "Megatron-LM").

Owns   which weight is divided along which dimension, each rank's part of it, and which numbers of
       ranks a model can be divided by.
Takes  names and sizes. Heads, gated rows and ids are divided; norms are whole on every rank.
Never  knows what carries the numbers: that is a `Group`.
"""

from typing import Protocol

from torch import Tensor

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.errors import ConfigError

# 0: a rank holds some of the outputs, or of the ids. 1: it holds some of the inputs, and computes
# its part of a sum.
_SPLIT_DIMENSIONS = {
    "token_embedding": 0, "query": 0, "key": 0, "value": 0, "out": 1,
    "mlp_gate": 0, "mlp_up": 0, "mlp_down": 1, "head": 0,
}  # fmt: skip


class Group(Protocol):
    """The ranks that share a model, as one of them sees it. Rank 0 leads."""

    rank: int
    size: int

    def sum(self, rows: Tensor) -> Tensor:
        """Sum the rows of all ranks, in place; each gets the sum."""

    def join(self, rows: Tensor) -> Tensor:
        """(T, C) of each → (T, size·C) for each, in the order of ranks."""


class Solo:
    """The group of a single rank."""

    rank = 0
    size = 1

    def sum(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def join(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows


def split_dimension(name: str) -> int | None:
    """Along which dimension a weight of a Llama is divided; None: each rank has all of it.

    Of an adapter, `high` is divided with the outputs of its weight, and `low` with the inputs.
    """
    *_, owner, module, part = ("", *name.split("."))
    if module != "adapter":
        return _SPLIT_DIMENSIONS.get(module)
    dimension = _SPLIT_DIMENSIONS.get(owner)
    return dimension if dimension == {"high": 0, "low": 1}[part] else None


def share(length: int, group: Group) -> range:
    """This rank's part of `length` rows: all parts have one length, except at the end."""
    longest = -(-length // group.size)
    return range(min(group.rank * longest, length), min((group.rank + 1) * longest, length))


def check_world_size(config: LanguageConfig, size: int) -> None:
    """Refuse a number of ranks that leaves one without a whole head, or without an id.

    Raises:
        ConfigError: it does not divide the model; the message lists the numbers that do.
    """
    if size < 1 or not _divides(config, size):
        fitting = [n for n in range(1, config.num_key_value_heads + 1) if _divides(config, n)]
        raise ConfigError(
            f"tensor_parallel is {size}, which does not divide this model: it has "
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} of them with keys "
            f"of their own, {config.intermediate_size} gated rows and {config.vocab_size} ids. "
            f"It can be {', '.join(map(str, fitting))}."
        )


def _divides(config: LanguageConfig, size: int) -> bool:
    whole = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    longest = -(-config.vocab_size // size)
    return not any(number % size for number in whole) and longest * (size - 1) < config.vocab_size
