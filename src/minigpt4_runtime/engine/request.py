"""What the engine is asked, and what it answers, one token at a time.

Owns   Request and TokenEvent. Never knows text: ids in, ids out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy
from numpy.typing import NDArray

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.messages import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heard:
    """What a watch makes of one more id: whether it ends the answer, and a note for the reader."""

    ends: bool = False
    note: object = None


class StopWatch(Protocol):
    """Gives an answer its meaning, which only the request's owner knows, and finds its end."""

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """Take one more id. `is_last` says that the answer ends here in any case."""
        ...

    def fork(self) -> Self:
        """A watch that has seen the same, for an answer that goes on another way."""
        ...


class NoWatch:
    """The watch of an answer that is ids alone: they end it by nothing that they say."""

    def feed(self, token_id: int, *, is_last: bool) -> Heard:  # noqa: ARG002
        """See `StopWatch`."""
        return Heard()

    def fork(self) -> Self:
        """It has nothing to remember."""
        return self


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
    """A prompt and how to go on from it. Its `watch` reads the answer as it grows.

    A `guide` holds the answer to a form, which only its owner can read.
    """

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams
    watch: StopWatch = field(default_factory=NoWatch)
    guide: Guide | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One more token, and what the watch noted about it. `finish_reason` stands on the last one."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    note: object = None
