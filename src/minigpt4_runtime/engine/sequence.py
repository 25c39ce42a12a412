"""A request while it is answered: its answer so far, and the blocks that cache it.

Owns   Sequence and its Branches; a sequence has one branch, or one for each beam.
Takes  a Request; gives ids and content keys by position.
Never  decides what runs. Knows no tensor.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from minigpt4_runtime.engine.beam import BeamSearch
from minigpt4_runtime.engine.plan import ImageRows
from minigpt4_runtime.engine.request import Guide, NoWatch, Request, StopWatch


@dataclass(eq=False)
class Branch:
    """One way an answer goes on. `answer` are its ids; `score` sums their log-probabilities.

    Tokens before `num_computed` have their keys and values in `blocks`; `keys` name the content of
    the blocks that are full, from the first on. While it holds blocks, row `table_row` of the block
    table is its own, and the runner has been told its first `num_told` blocks.
    """

    answer: list[int] = field(default_factory=list)
    score: float = 0.0
    watch: StopWatch = field(default_factory=NoWatch)
    guide: Guide | None = None
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    keys: list[bytes] = field(default_factory=list)
    table_row: int | None = None
    num_told: int = 0

    def say(self, token_id: int) -> None:
        """Grow by one id, and let its guide know."""
        self.answer.append(token_id)
        if self.guide:
            self.guide.feed(token_id)


class Sequence:
    """A request and its branches. `seed` and the number of a token decide how it is drawn."""

    def __init__(
        self, sequence_id: int, request: Request, *, seed: int, max_new_tokens: int
    ) -> None:
        self.id = sequence_id
        self.request = request
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        # Forked: the same request may be submitted again.
        guide = request.guide
        self.branches = [Branch(watch=request.watch.fork(), guide=guide.fork() if guide else None)]
        sampling = request.sampling
        self.search = (
            BeamSearch(sampling.num_beams, sampling.length_penalty, max_new_tokens)
            if sampling.num_beams > 1
            else None
        )

    @property
    def num_prompt(self) -> int:
        """How many tokens the prompt has."""
        return len(self.request.token_ids)

    @property
    def max_branches(self) -> int:
        """How many branches it may have."""
        return self.request.sampling.num_beams

    def num_tokens(self, branch: Branch) -> int:
        """The length of the prompt and of a branch's answer."""
        return self.num_prompt + len(branch.answer)

    def missing(self) -> list[int]:
        """How many tokens of each branch are not computed yet."""
        return [self.num_tokens(each) - each.num_computed for each in self.branches]

    def token_ids(self, branch: Branch, start: int, stop: int) -> tuple[int, ...]:
        """A branch's ids at these positions."""
        prompt, answer = self.request.token_ids, branch.answer
        first, last = max(0, start - len(prompt)), max(0, stop - len(prompt))
        return (*prompt[start:stop], *answer[first:last])

    def images(self, start: int, stop: int) -> tuple[ImageRows, ...]:
        """Which rows of which images stand at these positions."""
        found = []
        for image in self.request.images:
            first = max(start, image.start)
            last = min(stop, image.start + image.num_rows)
            if first < last:
                row = first - image.start
                found.append(ImageRows(image.digest, row, first - start, last - first))
        return tuple(found)

    def key(self, branch: Branch, index: int, block_size: int) -> bytes:
        """A name for the content of a full block: a digest of all ids and images up to its end."""
        while len(branch.keys) <= index:
            start = len(branch.keys) * block_size
            ids = self.token_ids(branch, start, start + block_size)
            content = hashlib.blake2b(branch.keys[-1] if branch.keys else b"", digest_size=16)
            content.update(array("q", ids).tobytes())
            for rows in self.images(start, start + block_size):
                content.update(f"{rows.digest}/{rows.image_row}/{rows.slice_row};".encode())
            branch.keys.append(content.digest())
        return branch.keys[index]

    def fork(self, branch: Branch) -> Branch:
        """A copy of a branch. The caller holds its blocks once more."""
        return Branch(
            list(branch.answer),
            branch.score,
            branch.watch.fork(),
            branch.guide.fork() if branch.guide else None,
            list(branch.blocks),
            branch.num_computed,
            list(branch.keys),
        )
