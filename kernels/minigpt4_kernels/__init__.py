"""CPU kernels of MiniGPT-4 Runtime, as the operators torch.ops.minigpt4_kernels.*.

Owns   the loading of the library, and the choice of the instructions that it uses.
Takes  the level from MINIGPT4_KERNELS_LEVEL, or the best that the processor has.
"""

import ctypes
import os
from pathlib import Path

import torch

# Counts changes of the operators: the runtime takes the number that it was written for.
INTERFACE = 5

_SUFFIX = {"nt": ".dll"}.get(os.name, ".so")
_PATH = Path(__file__).with_name(f"_library{_SUFFIX}")

torch.ops.load_library(str(_PATH))
_library = ctypes.CDLL(str(_PATH))
_library.minigpt4_kernels_level.restype = ctypes.c_char_p
_library.minigpt4_kernels_level_in_use.restype = ctypes.c_char_p


def levels() -> tuple[str, ...]:
    """The levels that this processor has, from the plainest to the fastest."""
    found: list[str] = []
    while name := _library.minigpt4_kernels_level(len(found)):
        found.append(name.decode())
    return tuple(found)


def level() -> str:
    """The level in use."""
    return str(_library.minigpt4_kernels_level_in_use().decode())


def use_level(name: str) -> None:
    """Compute with another level.

    Raises:
        ValueError: this processor, or this build, has no such level.
    """
    if not _library.minigpt4_kernels_use_level(name.encode()):
        raise ValueError(
            f"This processor has no level {name!r}; it has {', '.join(levels())}. Choose one."
        )


if wanted := os.environ.get("MINIGPT4_KERNELS_LEVEL"):
    use_level(wanted)
