"""What is left of a prompt when it and its answer have outgrown a window.

Owns   the rule. A prompt's beginning and the opening of the answer stay. Whole parts leave, the
       oldest first: exchanges of a dialogue with all their pictures, or ids of a text. When no part
       is left, ids of the answer leave.
Takes  a way to encode the prompt without its oldest parts; gives what is kept.
Never  cuts a picture or a turn, and keeps nothing that was computed: it names ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from minigpt4_runtime.errors import PromptTooLongError
from minigpt4_runtime.text.prompt import Prompt, Script
from minigpt4_runtime.text.tokenizer import EncodedPrompt

# So many steps empty a window. A larger step would forget more at once; a smaller one would compute
# what is kept more often.
_STEPS = 4
# Ids at the beginning of a text that stay, as in StreamingLLM (Xiao et al., 2023).
_TEXT_BEGINNING = 4


@dataclass(frozen=True)
class Kept:
    """The ids that are left, with the starts of the images among them, which are the last ones.

    `num_answer` ids of the answer have left too, and `num_tokens` tokens in all.
    """

    token_ids: tuple[int, ...]
    image_starts: tuple[int, ...]
    num_answer: int = 0
    num_tokens: int = 0

    @classmethod
    def whole(cls, encoded: EncodedPrompt) -> Kept:
        """All of a prompt."""
        return cls(encoded.token_ids, tuple(span.start for span in encoded.image_spans))


class Window:
    """A prompt, and an answer that may become longer than any context.

    They have up to `limit` tokens at once: those that stay, and up to `size` others. Where one more
    would not fit, a quarter of those leaves, so that the rest is computed anew only then.
    """

    def __init__(
        self,
        encode: Callable[[int], EncodedPrompt],
        part_sizes: Sequence[int],
        *,
        size: int,
        room: int,
    ) -> None:
        """Let as many parts leave as the prompt needs alone; the last part stays.

        `encode` gives the prompt without so many of its oldest parts, which have about these sizes;
        `room` is the largest limit.

        Raises:
            PromptTooLongError: the last part and what stays do not fit.
        """
        before = (0, *accumulate(part_sizes))

        @cache
        def keep(mark: int) -> Kept:
            kept = Kept.whole(encode(mark))
            return replace(kept, num_tokens=before[mark])

        self._keep = keep
        num_parts, beginning = len(part_sizes), len(keep(len(part_sizes)).token_ids)
        self.limit = min(beginning + size, room)
        self._step = max(1, (self.limit - beginning) // _STEPS)
        # The parts that have left after each step: a later prompt of this dialogue takes the same.
        marks = [0]
        for parts in range(1, num_parts):
            if parts == num_parts - 1 or before[parts] - before[marks[-1]] >= self._step:
                marks.append(parts)
        *marks, last = marks
        marks = [each for each in marks if beginning + before[-1] - before[each] <= self.limit]
        first = next((each for each in marks if self._size(each) <= self.limit), last)
        if self._size(first) > self.limit or beginning >= self.limit:
            raise PromptTooLongError(
                self._size(first), self.limit, "the window", "Shorten it or raise cache_window."
            )
        self._marks = [*(each for each in (*marks, last) if each >= first), num_parts]

    def _size(self, mark: int) -> int:
        return len(self._keep(mark).token_ids)

    def fit(self, num_answer: int) -> Kept:
        """What is left beside an answer of so many ids."""
        for mark in self._marks:
            if self._size(mark) + num_answer <= self.limit:
                return self._keep(mark)
        whole = self._keep(self._marks[-1])
        over = len(whole.token_ids) + num_answer - self.limit
        leaving = -(-over // self._step) * self._step
        return replace(whole, num_answer=leaving, num_tokens=whole.num_tokens + leaving)


def dialogue_window(
    script: Script, encode: Callable[[Prompt], EncodedPrompt], *, size: int, room: int
) -> Window:
    """The window of a dialogue, whose exchanges leave with all their pictures."""
    count = len(script.exchanges)
    beginning = len(encode(script.prompt(count)).token_ids)
    part_sizes = [len(encode(script.prompt(i, i + 1)).token_ids) - beginning for i in range(count)]
    return Window(lambda skipped: encode(script.prompt(skipped)), part_sizes, size=size, room=room)


def text_window(token_ids: Sequence[int], *, size: int, room: int) -> Window:
    """The window of a text that is no dialogue: any of its ids may leave but the first few."""
    beginning, rest = tuple(token_ids[:_TEXT_BEGINNING]), tuple(token_ids[_TEXT_BEGINNING:])

    def encode(skipped: int) -> EncodedPrompt:
        return EncodedPrompt((*beginning, *rest[skipped:]), (), (), "")

    return Window(encode, [1] * len(rest), size=size, room=room)
