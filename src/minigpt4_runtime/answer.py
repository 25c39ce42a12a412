"""Ids → the text a user sees: cut at stop strings, trimmed as the original trims it.

Owns   the text of one answer while it grows.
Takes  token ids one by one; gives text that nothing after it can take back.
Never  knows why a token came, only what it says.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from minigpt4_runtime.prompt import Template
from minigpt4_runtime.tokenizer import TextStream, Tokenizer


class StopWatch:
    """Says which id ends an answer by its text. Give it each id once."""

    def __init__(self, answer: AnswerText) -> None:
        self._answer = answer

    def feed(self, token_id: int) -> bool:
        """Take one more id; say whether a stop string is complete with it."""
        self._answer.feed(token_id)
        return self._answer.stopped

    def fork(self) -> StopWatch:
        """A watch that has seen the same, for an answer that goes on another way."""
        return StopWatch(self._answer.fork())


class AnswerText:
    """One answer's text. `feed` until `stopped`; then `finish`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        stop: Sequence[str] | None,
        *,
        has_form: bool = False,
    ) -> None:
        """`stop` as in SamplingParams: None, () or strings beside the template's.

        To an answer that has a form of its own the template's stops and marks are text.
        """
        self._stream = TextStream(tokenizer)
        self._uses_template = not has_form and (stop is None or len(stop) > 0)
        self._stops = (*(template.stops if self._uses_template else ()), *(stop or ()))
        self._mark = template.answer_mark
        self._text = ""
        self._num_given = 0
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Take one more id; give what may be shown now. Sets `stopped` at a stop string."""
        return self._extend(self._stream.feed(token_id), is_last=False)

    def finish(self) -> str:
        """Give what was held back, now that nothing follows."""
        return self._extend("" if self.stopped else self._stream.flush(), is_last=True)

    @property
    def has_stops(self) -> bool:
        """Whether any text can end this answer."""
        return bool(self._stops)

    @property
    def reply(self) -> str:
        """The whole text so far, as upstream's Chat.answer cuts and strips it."""
        text = self._text
        # The original also drops everything up to a last "Assistant:" that the model wrote itself.
        return (text.rpartition(self._mark)[2] if self._uses_template else text).strip()

    def fork(self) -> AnswerText:
        """An answer that has said the same and goes on by itself."""
        other = copy.copy(self)
        other._stream = self._stream.fork()  # noqa: SLF001 - of this very class.
        return other

    def _extend(self, text: str, *, is_last: bool) -> str:
        searched = max((len(stop) for stop in self._stops), default=1) - 1
        first = max(0, len(self._text) - searched)
        self._text += text
        found = [at for stop in self._stops if (at := self._text.find(stop, first)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        visible = self._text if is_last or self.stopped else self._text[: self._num_certain()]
        # Space at either end is not part of a reply: wait for what follows it.
        visible = visible.rstrip()
        shown = visible[self._num_given :]
        if self._num_given == 0:
            shown = shown.lstrip()
        self._num_given = max(self._num_given, len(visible))
        return shown

    def _num_certain(self) -> int:
        """How much of the text cannot become part of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for held in range(min(longest - 1, len(self._text)), 0, -1):
            tail = self._text[-held:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._text) - held
        return len(self._text)
