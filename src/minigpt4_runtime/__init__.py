"""Run MiniGPT-4: describe and discuss pictures.

    from minigpt4_runtime import MiniGPT4
    print(MiniGPT4.load().describe("scene.png").text)

Owns the public names. They load on first use, so that importing this package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4, NextLogits
    from minigpt4_runtime.config import EngineConfig, SamplingParams
    from minigpt4_runtime.errors import (
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        ImageError,
        MiniGPT4Error,
        PromptTooLongError,
        RequestError,
    )
    from minigpt4_runtime.messages import (
        Box,
        ImageSource,
        Message,
        Reply,
        TextDelta,
        Usage,
        image,
    )
    from minigpt4_runtime.ranks import follow

__version__ = "0.1.0"

_HOMES = {
    "MiniGPT4": "api",
    "NextLogits": "api",
    "EngineConfig": "config",
    "SamplingParams": "config",
    "BackendUnavailableError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ImageError": "errors",
    "MiniGPT4Error": "errors",
    "PromptTooLongError": "errors",
    "RequestError": "errors",
    "Box": "messages",
    "ImageSource": "messages",
    "Message": "messages",
    "Reply": "messages",
    "TextDelta": "messages",
    "Usage": "messages",
    "image": "messages",
    "follow": "ranks",
}

__all__ = [
    "BackendUnavailableError", "Box", "CheckpointError", "ConfigError", "EngineConfig",
    "ImageError", "ImageSource", "Message", "MiniGPT4", "MiniGPT4Error", "NextLogits",
    "PromptTooLongError", "Reply", "RequestError", "SamplingParams", "TextDelta", "Usage",
    "__version__", "follow", "image",
]  # fmt: skip


if not TYPE_CHECKING:  # A type checker must not believe that every name exists.

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'minigpt4_runtime' has no attribute {name!r}")
        value = getattr(import_module(f"minigpt4_runtime.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
