"""What the engine is asked, and what it answers, one token at a time.

Owns   Request and TokenEvent. Never knows text: ids in, ids out.
"""

from dataclasses import dataclass

from torch import Tensor

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.messages import FinishReason


@dataclass(frozen=True, eq=False)
class ImageInput:
    """A picture in a prompt: its pixels (3, S, S), and where its rows start among the ids.

    `digest` tells pictures apart whose rows have the same placeholder ids.
    """

    pixels: Tensor
    digest: str
    start: int
    num_rows: int


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it."""

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class TokenEvent:
    """One more token. `finish_reason` stands on the last one."""

    token_id: int
    finish_reason: FinishReason | None
