"""One request's ids → text, deltas and the reply.

Owns   the decoding of an answer while it grows, in the engine's thread, and the reading of its
       events, in the caller's.
Takes  ids and TokenEvents; gives Heards and TextDeltas.
Never  chooses an id.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from minigpt4_runtime.engine.request import Heard, TokenEvent
from minigpt4_runtime.messages import Reply, TextDelta, TokenLogprobs, Usage
from minigpt4_runtime.text.answer import AnswerText
from minigpt4_runtime.text.boxes import find_boxes
from minigpt4_runtime.text.window import Kept, Window


class _Said(NamedTuple):
    """The text that one id adds to an answer; the last id has the whole `reply` too."""

    text: str
    reply: str = ""


class TextWatch:
    """Decodes an answer as it grows, in the engine's thread."""

    def __init__(self, answer: AnswerText) -> None:
        self._answer = answer

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """The text that is certain with this id; the answer ends where a stop string is whole."""
        text, ends = self._answer.feed(token_id), self._answer.stopped
        if not (ends or is_last):
            return Heard(note=_Said(text))
        return Heard(ends, _Said(text + self._answer.finish(), self._answer.reply))

    def fork(self) -> TextWatch:
        """A copy, for another branch of the answer."""
        return TextWatch(self._answer.fork())


class ReplyReader:
    """Turns one request's events into deltas of text."""

    def __init__(
        self,
        kept: Kept,
        window: Window | None,
        num_images: int,
        shown: tuple[int, int] | None = None,
    ) -> None:
        """`num_images` are those of the whole prompt.

        `shown` is the size of the picture that boxes in the answer are parts of.
        """
        self._kept = kept
        self._window = window
        self._num_images = num_images
        self._shown = shown
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_told = 0  # Of the logprobs.

    def __call__(self, event: TokenEvent) -> TextDelta | None:
        """What an event adds to the text; None where that is nothing."""
        self._token_ids.append(event.token_id)
        if event.logprobs:
            self._logprobs.append(event.logprobs)
        said = cast(_Said, event.note)
        usage = self._usage()
        if event.finish_reason is None:
            return TextDelta(said.text, None, self._new_logprobs(), usage) if said.text else None
        reply = Reply(
            said.reply,
            tuple(self._token_ids),
            event.finish_reason,
            usage,
            tuple(self._logprobs) or None,
            find_boxes(said.reply, self._shown) if self._shown else (),
            self._shown,
        )
        return TextDelta(said.text, reply, self._new_logprobs(), usage)

    def _usage(self) -> Usage:
        num_answer = len(self._token_ids)
        kept = self._window.fit(num_answer - 1) if self._window else self._kept
        num_left = self._num_images - len(kept.image_starts)
        return Usage(len(self._kept.token_ids), num_answer, kept.num_tokens, num_left)

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        first, self._num_told = self._num_told, len(self._logprobs)
        return tuple(self._logprobs[first:])
