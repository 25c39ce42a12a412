"""The published model families: the parts of each, their template, and the map of their names.

Owns   LAYOUTS, with one entry for each family, and the choice of an entry.
Takes  the parts that a user gave; gives their Layout.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.convert import key_map
from minigpt4_runtime.convert.key_map import PartMap
from minigpt4_runtime.convert.vicuna_version import describe_version


@dataclass(frozen=True)
class Layout:
    """One family: its name for users, the template of its training, and its parts.

    `parts` are in the order in which their weights are written. `describe_doubt` gives a warning
    about a language model's folder, or an empty text.
    """

    title: str
    template: str
    parts: Mapping[str, Callable[[ModelConfig], PartMap]]
    describe_doubt: Callable[[Path], str] = lambda _: ""


LAYOUTS = (
    Layout(
        "Vicuna",
        template="vicuna",
        parts={
            "language": key_map.language_map,
            "vision": key_map.vision_map,
            "qformer": key_map.qformer_map,
            "projection": key_map.projection_map,
        },
        describe_doubt=describe_version,
    ),
    Layout(
        "Llama-2",
        template="llama2",
        parts={
            "language": key_map.language_map,
            "vision": key_map.vision_map,
            "projection": key_map.grouped_projection_map,
        },
    ),
)


def choose_layout(roles: Collection[str]) -> Layout:
    """The layout that is made of these parts."""
    return next(layout for layout in LAYOUTS if layout.parts.keys() == set(roles))
