"""Names → weight formats, as a table of "module:attribute", and which weight has which.

Owns   which names exist. A format stands in a row of WEIGHT_FORMATS and nowhere else.
Takes  the choice in a manifest: one name for all weights, or names for parts of the model.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import cast

from minigpt4_runtime.formats.contracts import WeightFormat
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.float8 import FLOAT8
from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.formats.sparse import SPARSE_FORMATS

# A row leads to a format, or to a mapping that has it by its name.
WEIGHT_FORMATS = {
    "float": "minigpt4_runtime.formats.dense:DENSE",
    **dict.fromkeys(INTEGER_FORMATS, "minigpt4_runtime.formats.integer:INTEGER_FORMATS"),
    **dict.fromkeys(SPARSE_FORMATS, "minigpt4_runtime.formats.sparse:SPARSE_FORMATS"),
    FLOAT8.name: "minigpt4_runtime.formats.float8:FLOAT8",
}
# A format's name; or one for each part of the model, as {"language.layers": "float"}, and weights
# that lie in none of them are dense.
FormatChoice = str | Mapping[str, str]


def weight_format(name: str) -> WeightFormat:
    """The format of that name in WEIGHT_FORMATS."""
    found = resolve_name(WEIGHT_FORMATS[name])
    return cast(WeightFormat, found[name] if isinstance(found, Mapping) else found)


def format_of(choice: FormatChoice, weight_name: str) -> WeightFormat:
    """The format of a weight: that of the narrowest part that it lies in."""
    if isinstance(choice, str):
        return weight_format(choice)
    around = [part for part in choice if f"{weight_name}.".startswith(f"{part}.")]
    return weight_format(choice[max(around, key=len)]) if around else DENSE


def show_formats(choice: FormatChoice) -> str:
    """A choice in words: "w8a8 in language.head and vision, float elsewhere"."""
    if isinstance(choice, str):
        return choice
    where = {name: [part for part in choice if choice[part] == name] for name in choice.values()}
    floats = where.pop(DENSE.name, [])
    held = [f"{name} in {' and '.join(parts)}" for name, parts in where.items()]
    rest = f"in {' and '.join(floats)} and elsewhere" if floats else "elsewhere"
    return ", ".join([*held, f"{DENSE.name} {rest}"])


def unknown_format(choice: FormatChoice) -> object:
    """The first name in a choice that is not in WEIGHT_FORMATS, or None."""
    names = [choice] if isinstance(choice, str) else choice.values()
    return next((name for name in names if name not in list(WEIGHT_FORMATS)), None)
