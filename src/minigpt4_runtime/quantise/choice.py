"""Which part of a model gets which weight format.

Owns   the names that a user types, and the formats of the head and the image side where none is
       named. Takes a ModelConfig and a QuantisePlan; gives a FormatChoice that the model can hold.
Never  reads a file, and loads no torch before it has to know the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.formats.float8 import FLOAT8, Float8Format
from minigpt4_runtime.formats.integer import GROUP_SIZES, INTEGER_FORMATS, IntegerFormat
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.formats.sparse import SPARSE_FORMATS, SparseFormat

# How layers are rounded by what they read: see `LayerWalk`.
Method = Literal["gptq", "awq", "awq+gptq"]
DEFAULT_METHOD: Method = "gptq"
FAMILIES = tuple(dict.fromkeys(each.family for each in INTEGER_FORMATS.values()))
# What a user can choose.
_Chosen = IntegerFormat | SparseFormat | Float8Format
_WHOLE_NAMES: Mapping[str, _Chosen] = {**INTEGER_FORMATS, **SPARSE_FORMATS, FLOAT8.name: FLOAT8}
KEEP = "keep"
_FLOAT = "float"
# The first has 588 inputs, which no group divides; 8 bits in the second make more than half of the
# image side's error (docs/quantisation.md). Both are a small part of its weights.
_ALWAYS_FLOAT = ("vision.vit.patch_embedding", "vision.projection")


@dataclass(frozen=True, kw_only=True)
class QuantisePlan:
    """What a user chose. `weights` is for the language model's layers; None: see `choose`."""

    weights: str
    group_size: int | None = None
    is_symmetric: bool = True
    head: str | None = None
    image_side: str | None = None


def choose(plan: QuantisePlan, config: ModelConfig) -> FormatChoice:
    """The formats of a model's parts.

    Without a word on them, the head and the image side get 8 bits, and rows that are rounded where
    those of the layers are. There 8 bits have a scale for each row, whatever the plan says of
    groups. 4 bits have groups of 32 where it says nothing.

    Raises:
        ConfigError: a name is unknown, settings contradict each other, or a format cannot hold a
            weight of this model.
    """
    layers = _read(plan.weights, plan)
    if (
        plan.weights in _WHOLE_NAMES
        and plan.weights not in FAMILIES
        and (plan.group_size is not None or not plan.is_symmetric)
    ):
        raise ConfigError(
            f"{plan.weights} has its own groups and zero points: leave out the group size and "
            "asymmetric."
        )
    eight_bits = IntegerFormat(8, layers.rounds_rows)
    named: dict[str, _Chosen] = {
        "language.layers": layers, "language.head": eight_bits, "vision": eight_bits,
    }  # fmt: skip
    for part, value in (("language.head", plan.head), ("vision", plan.image_side)):
        if value == KEEP:
            del named[part]
        elif value is not None:
            found = _read(value, plan)
            is_plain = found.bits == 8 and value in FAMILIES
            named[part] = IntegerFormat(8, found.rounds_rows) if is_plain else found
    choice = {part: each.name for part, each in named.items()}
    if "vision" in choice:
        choice |= dict.fromkeys(_ALWAYS_FLOAT, _FLOAT)
    _refuse_unfit(choice, config)
    return choice


def _read(typed: str, plan: QuantisePlan) -> _Chosen:
    """A format by its whole name, or by its family and what else the plan says."""
    if typed in _WHOLE_NAMES and typed not in FAMILIES:
        return _WHOLE_NAMES[typed]
    if typed not in FAMILIES:
        raise ConfigError(
            f"There is no weight format {typed!r}; there is "
            f"{', '.join([*FAMILIES, *SPARSE_FORMATS, FLOAT8.name])}, and the first four with "
            f"groups and zero points by name, as in {list(INTEGER_FORMATS)[-1]}."
        )
    if plan.group_size not in (None, *GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError(f"The group size is {plan.group_size}; it can be {sizes}.")
    bits: Literal[8, 4] = 4 if typed.startswith("w4") else 8
    group_size = plan.group_size or (GROUP_SIZES[0] if bits == 4 else None)
    return IntegerFormat(bits, typed.endswith("a8"), group_size, plan.is_symmetric)


def _refuse_unfit(choice: FormatChoice, config: ModelConfig) -> None:
    from minigpt4_runtime.checkpoint.sizes import list_all_parts

    list_all_parts(config, choice)
