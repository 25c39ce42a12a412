"""The requests that an engine takes, and the events that it gives, one for each token.

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

    from minigpt4_runtime.engine.steering import LogitsProcessor


@dataclass(frozen=True)
class Heard:
    """A watch's result for one id: whether it ends the answer, and a note for the reader."""

    ends: bool = False
    note: object = None


class StopWatch(Protocol):
    """Reads an answer for the request's owner, and finds its end."""

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """Take one more id. `is_last` says that the answer ends here in any case."""

    def fork(self) -> Self:
        """A copy, for another branch of the answer."""


class NoWatch:
    """The watch of an answer that is read as ids: none of them ends it."""

    def feed(self, token_id: int, *, is_last: bool) -> Heard:  # noqa: ARG002
        """See `StopWatch`."""
        return Heard()

    def fork(self) -> Self:
        """The same one: it has no state."""
        return self


class Guide(Protocol):
    """Says which ids may come next in an answer of a given form."""

    def allowed(self) -> NDArray[numpy.bool_]:
        """(V,): whether each id may come next. At least one may."""

    def feed(self, token_id: int) -> None:
        """Take one more id."""

    def fork(self) -> Self:
        """A copy, for another branch of the answer."""


class Kept(Protocol):
    """What a window holds: these ids, and the last images of the request, with their starts.

    The first `num_answer` ids of the answer have left it.
    """

    @property
    def token_ids(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def image_starts(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def num_answer(self) -> int: ...  # noqa: D102


class Window(Protocol):
    """Lets the oldest tokens of a request leave where it has more than `limit` of them."""

    @property
    def limit(self) -> int:
        """How many tokens are held at once."""

    def fit(self, num_answer: int) -> Kept:
        """What is held beside an answer of so many ids: at most `limit` tokens."""


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An image in a prompt: its pixels (3, S, S), and where its rows start among the ids.

    `digest` tells images apart, since the rows of all have the same placeholder ids.
    """

    pixels: Tensor
    digest: str
    start: int
    num_rows: int


@dataclass(frozen=True, eq=False)
class Beside:
    """Another prompt, which gets the ids that a request's answer gets: see `Request.beside`."""

    name: str
    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it. Its `watch` reads the answer as it grows.

    A `guide` restricts the answer to a form. With a `window` it may outgrow any context.
    `processors` change the logits before an id is chosen, and see those of the prompts `beside` by
    their names; these take neither beams nor a window. With `candidates` nothing is chosen: the
    only event has the log-probability of each candidate as its note. `adapter` is the number of the
    adapter that computes it, 0 for none; where that has an image side of its own, the digests of
    the images say so.
    """

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams
    watch: StopWatch = field(default_factory=NoWatch)
    guide: Guide | None = None
    window: Window | None = None
    processors: tuple[LogitsProcessor, ...] = field(default=(), kw_only=True)
    beside: tuple[Beside, ...] = field(default=(), kw_only=True)
    candidates: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True)
    adapter: int = field(default=0, kw_only=True)

    @property
    def all_images(self) -> tuple[ImageInput, ...]:
        """Those of all its prompts."""
        return (*self.images, *(image for each in self.beside for image in each.images))


@dataclass(frozen=True)
class TokenEvent:
    """One more token, and the watch's note about it. Only the last one has a `finish_reason`."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    note: object = None
