"""The published model families: the parts of each, their template, and the map of their names.

Owns   LAYOUTS, with one entry for each family, and the choice of an entry.
Takes  the parts that a user gave, and what tells families of the same parts apart; gives a Layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.convert import key_map
from minigpt4_runtime.convert.key_map import PartMap
from minigpt4_runtime.convert.vicuna_version import describe_version
from minigpt4_runtime.errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """One family: its names for users and upstream, the template of its training, and its parts.

    `parts` are in the order in which their weights are written. `describe_doubt` gives a warning
    about a language model's folder, or an empty text. `image_sizes` are the picture's sides in
    training, by the width of the tower; without them the position table's own counts.
    """

    title: str
    arch: str
    template: str
    parts: Mapping[str, Callable[[ModelConfig], PartMap]]
    describe_doubt: Callable[[Path], str] = lambda _: ""
    image_sizes: Mapping[int, int] | None = None
    has_adapters: bool = False


_GROUPED_PARTS: Mapping[str, Callable[[ModelConfig], PartMap]] = {
    "language": key_map.language_map,
    "vision": key_map.vision_map,
    "projection": key_map.grouped_projection_map,
}

LAYOUTS = (
    Layout(
        "Vicuna",
        arch="minigpt4",
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
        arch="minigpt4",
        template="llama2",
        parts=_GROUPED_PARTS,
    ),
    Layout(
        "MiniGPT-v2",
        arch="minigpt_v2",
        template="minigptv2",
        parts=_GROUPED_PARTS,
        image_sizes={1408: 448},
        has_adapters=True,
    ),
)
VARIANTS = tuple(layout.template for layout in LAYOUTS)


def choose_layout(
    parts: Mapping[str, object], *, variant: str | None, arch: str | None, has_adapters: bool
) -> tuple[Layout, bool]:
    """The layout that is made of these parts, and whether anything tells it from others.

    The `variant` that a user names counts first, then upstream's name of the `arch`, then adapters.

    Raises:
        CheckpointError: the named variant has other parts.
    """
    fitting = [layout for layout in LAYOUTS if layout.parts.keys() == parts.keys()]
    if variant is not None:
        named = [layout for layout in fitting if layout.template == variant]
        if not named:
            fits = " or ".join(layout.template for layout in fitting)
            raise CheckpointError(
                f"--variant is {variant!r}, but the files are those of {fits}. Only the Vicuna "
                "variant has --qformer and --bert."
            )
        return named[0], True
    named = [layout for layout in fitting if layout.arch == arch]
    if len(fitting) == 1 or named:
        return (named or fitting)[0], True
    found = next(layout for layout in fitting if layout.has_adapters == has_adapters)
    return found, has_adapters
