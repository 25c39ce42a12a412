"""What a training program wrote about a model beside its weights.

Owns   upstream's names of the settings (`config`, `model`) that no weight can tell.
Takes  a projection file; gives its Training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minigpt4_runtime.checkpoint.file_kind import as_number
from minigpt4_runtime.convert.published import read_settings
from minigpt4_runtime.errors import CheckpointError

# Upstream registered its first model as mini_gpt4 before MiniGPT-v2 came, so the published Llama-2
# file, which is older, has that name.
_RENAMED = {"mini_gpt4": "minigpt4"}


@dataclass(frozen=True)
class Training:
    """Upstream's name of the model, the picture's side in pixels, and LoRA's alpha, if written."""

    arch: str | None = None
    image_size: int | None = None
    lora_alpha: float | None = None


def read_training(path: Path) -> Training:
    """Read what stands beside the weights of a projection file.

    Raises:
        CheckpointError: the file cannot be opened, or a setting is not what it should be.
    """
    settings = read_settings(path)
    arch = settings.get("arch")
    size = _read_number(path, settings, "image_size")
    if size is not None and not size.is_integer():
        raise _refuse(path, "image_size", size)
    return Training(
        _RENAMED.get(arch, arch) if isinstance(arch, str) else None,
        None if size is None else int(size),
        _read_number(path, settings, "lora_alpha"),
    )


def _read_number(path: Path, settings: Mapping[str, object], name: str) -> float | None:
    value = settings.get(name)
    number = as_number(value)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 2**31:
        raise _refuse(path, name, value)
    return float(number)


def _refuse(path: Path, name: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: config.model.{name} is {value!r:.80}; a number above 0 is wanted, of pixels a "
        "whole one. Save the file with its right settings, or without them."
    )
