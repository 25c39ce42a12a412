"""Ids → the text for the user: cut at stop strings, and an answer trimmed as by the original.

Owns   the text of one answer while it grows.
Takes  token ids one by one; gives text that no later id can change.
Never  knows how a token was chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.text.prompt import Template
from minigpt4_runtime.text.tokenizer import TextStream, Tokenizer


class AnswerText:
    """One answer's text. `feed` until `stopped`; then `finish`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        sampling: SamplingParams,
        *,
        before: Sequence[int] = (),
        begins_with: str | None = None,
    ) -> None:
        """It ends at the strings in `stop` of `sampling`, and at the template's.

        `before` are the ids that the text continues. `begins_with` is the part of them that belongs
        to it; None lets it begin without a space. Without a template nothing is trimmed. In a text
        with a grammar the template's stops and marks are plain text, and the space before the text
        is left out.
        """
        stop, has_form = sampling.stop, sampling.grammar is not None
        self._stream = TextStream(tokenizer, before)
        self._trims_start = begins_with is None or has_form
        self._trims_end = template is not None
        heeded = template if not has_form and (stop is None or len(stop) > 0) else None
        self._stops = (*(heeded.stops if heeded else ()), *(stop or ()))
        self._longest_stop = max((len(stop) for stop in self._stops), default=1)
        self._mark = heeded.answer_mark if heeded else None
        self._text = begins_with or ""
        self._num_given = 0
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Take one more id; give what may be shown now. Sets `stopped` at a stop string."""
        return self._extend(self._stream.feed(token_id), is_last=False)

    def finish(self) -> str:
        """Give the text that was held back, at the end of the ids."""
        return self._extend("" if self.stopped else self._stream.flush(), is_last=True)

    @property
    def reply(self) -> str:
        """The whole text so far, as upstream's Chat.answer cuts and strips it."""
        text = self._text
        # The original also drops everything up to a last "Assistant:" that the model wrote itself.
        text = text.rpartition(self._mark)[2] if self._mark else text
        text = text.lstrip() if self._trims_start else text
        return text.rstrip() if self._trims_end else text

    def fork(self) -> AnswerText:
        """An answer that has said the same and goes on by itself."""
        other = copy.copy(self)
        other._stream = self._stream.fork()  # noqa: SLF001 - of this very class.
        return other

    def _extend(self, text: str, *, is_last: bool) -> str:
        first = max(0, len(self._text) + 1 - self._longest_stop)
        self._text += text
        found = [at for stop in self._stops if (at := self._text.find(stop, first)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        visible = self._text if is_last or self.stopped else self._text[: self._num_certain()]
        # Space at either end is not part of a reply: wait for what follows it.
        visible = visible.rstrip() if self._trims_end else visible
        shown = visible[self._num_given :]
        if self._trims_start and not self._text[: self._num_given].strip():
            shown = shown.lstrip()
        self._num_given = max(self._num_given, len(visible))
        return shown

    def _num_certain(self) -> int:
        """How much of the text cannot become part of a stop string."""
        for held in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            tail = self._text[-held:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._text) - held
        return len(self._text)
