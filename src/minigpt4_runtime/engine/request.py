"""What the engine is asked, and what it answers, one token at a time.

Owns   Request and TokenEvent. Never knows text: ids in, ids out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy
from numpy.typing import NDArray

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.messages import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from torch import Tensor


class StopWatch(Protocol):
    """Watches an answer for stop strings, which only its owner can read."""

    def feed(self, token_id: int) -> bool:
        """Take one more id; say whether the answer ends with it."""
        ...

    def fork(self) -> Self:
        """A watch that has seen the same, for an answer that goes on another way."""
        ...


class Guide(Protocol):
    """Says which ids may come next in an answer that has a form to keep to."""

    def allowed(self) -> NDArray[numpy.bool_]:
        """(V,): whether each id may come next. At least one may."""
        ...

    def feed(self, token_id: int) -> None:
        """Take one more id."""
        ...

    def fork(self) -> Self:
        """A guide that was fed the same, for an answer that goes on another way."""
        ...


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
    """A prompt and how to go on from it. Without a `watch` only the end id and lengths end it.

    A `guide` holds the answer to a form, which only its owner can read.
    """

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams
    watch: StopWatch | None = None
    guide: Guide | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One more token. `finish_reason` stands on the last one."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
