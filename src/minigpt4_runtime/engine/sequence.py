"""A request while it is answered: its answer so far, and the blocks that cache it.

Owns   Sequence and its Branches; a sequence has one branch, or one for each beam, for each prompt
       beside its own, or for each candidate that is scored.
Takes  a Request; gives ids and content keys by position.
Never  decides what runs. Knows no tensor.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field, replace

from minigpt4_runtime.engine.beam import BeamSearch
from minigpt4_runtime.engine.plan import UNKNOWN_ID, ImageRows
from minigpt4_runtime.engine.request import Guide, ImageInput, NoWatch, Request, StopWatch
from minigpt4_runtime.engine.scoring import Scoring


@dataclass(eq=False)
class Context:
    """What stands before an answer: ids and images, as far as they have not left the window.

    So many of the first ids of the answer have left it too.
    """

    token_ids: tuple[int, ...] = ()
    images: tuple[ImageInput, ...] = ()
    num_left: int = 0


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
    context: Context = field(default_factory=Context)

    def say(self, token_id: int) -> None:
        """Grow by one id, and let its guide know."""
        self.answer.append(token_id)
        if self.guide:
            self.guide.feed(token_id)


class Sequence:
    """A request and its branches. `seed` and the number of a token decide how it is drawn."""

    def __init__(
        self,
        sequence_id: int,
        request: Request,
        *,
        seed: int,
        max_new_tokens: int,
        scored_at_once: int = 1,
    ) -> None:
        self.id = sequence_id
        self.request = request
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        # Where the last step has chosen a next id that is not read yet, the row of its logits.
        self.choice: int | None = None
        self._context = context = Context(request.token_ids, request.images)
        # Forked: the same request may be submitted again.
        guide = request.guide.fork() if request.guide else None
        self.branches = [Branch(watch=request.watch.fork(), guide=guide, context=context)]
        for other in request.beside:
            self.branches.append(Branch(context=Context(other.token_ids, other.images)))
        self.scoring: Scoring | None = None
        if request.candidates:
            self.scoring = Scoring(request.candidates, scored_at_once)
            self.branches = self.candidates()
        # Whether nothing but the sampler's settings stands between its logits and its next id.
        self.is_plain = not (request.processors or request.candidates)
        sampling = request.sampling
        self.search = (
            BeamSearch(sampling.num_beams, sampling.length_penalty, max_new_tokens)
            if sampling.num_beams > 1
            else None
        )

    @property
    def num_prompt(self) -> int:
        """How many tokens the prompt has, as far as they have not left the window."""
        return len(self._context.token_ids)

    @property
    def num_shared(self) -> int:
        """How many of the prompt's tokens are computed once, for all branches.

        A candidate's first id is told by the prompt's last row, which is each branch's own.
        """
        if len(self.branches) == 1 or self.request.beside:
            return 0
        return self.num_prompt - 1 if self.scoring else self.num_prompt

    @property
    def roots(self) -> list[Branch]:
        """The branches that begin with nothing computed; the others are forked from the first."""
        return self.branches if self.request.beside else self.branches[:1]

    @property
    def answers(self) -> list[Branch]:
        """The branches of the request's own prompt."""
        return self.branches[:1] if self.request.beside else self.branches

    def most_tokens(self, branch: Branch) -> int:
        """How many tokens a branch may have at once."""
        whole, window = len(branch.context.token_ids) + self.max_new_tokens, self.request.window
        return whole if window is None else min(whole, window.limit)

    def most_reused(self, branch: Branch) -> int:
        """How many tokens of a root may come from the cache: the others' logits are wanted."""
        if self.scoring:
            return self.num_prompt - 1
        return self.num_shared or self.num_tokens(branch) - 1

    @property
    def max_branches(self) -> int:
        """How many branches it may have."""
        if self.scoring:
            return self.scoring.at_once
        return self.request.sampling.num_beams + len(self.request.beside)

    @property
    def num_rows(self) -> int:
        """How many rows of logits it has in a step that samples it."""
        return len(self.scoring.targets) if self.scoring else len(self.branches)

    def num_tokens(self, branch: Branch) -> int:
        """The length of the prompt and of a branch's answer, but for what has left the window.

        An id that is chosen and not read yet counts too.
        """
        context, is_one_ahead = branch.context, self.choice is not None
        return len(context.token_ids) + len(branch.answer) + is_one_ahead - context.num_left

    def can_be_ahead(self) -> bool:
        """Whether a step needs no more of the step before than the id that it has chosen."""
        window = self.request.window
        can_slide = window is not None and self.num_tokens(self.branches[0]) >= window.limit
        return self.search is None and self.scoring is None and not can_slide

    def slide(self) -> bool:
        """Let the oldest tokens leave if there are more than the window holds.

        All others then have new positions and are to be computed anew, as if nothing else had been
        said: an answer stays the same in any batch, and after a preemption.
        """
        window, answer = self.request.window, self.branches[0].answer
        if window is None or self.num_tokens(self.branches[0]) <= window.limit:
            return False
        kept, images = window.fit(len(answer)), self.request.images
        context, last_images = self._context, images[len(images) - len(kept.image_starts) :]
        context.token_ids, context.num_left = kept.token_ids, kept.num_answer
        context.images = tuple(
            replace(image, start=start)
            for image, start in zip(last_images, kept.image_starts, strict=True)
        )
        for branch in self.branches:
            branch.keys = []
        return True

    def missing(self) -> list[int]:
        """How many tokens of each branch are not computed yet."""
        return [self.num_tokens(each) - each.num_computed for each in self.branches]

    def token_ids(self, branch: Branch, start: int, stop: int) -> tuple[int, ...]:
        """A branch's ids at these positions."""
        prompt, num_left, answer = branch.context.token_ids, branch.context.num_left, branch.answer
        first, last = (max(0, each - len(prompt)) + num_left for each in (start, stop))
        unread = () if self.choice is None or last <= len(answer) else (UNKNOWN_ID,)
        return (*prompt[start:stop], *answer[first:last], *unread)

    def images(self, branch: Branch, start: int, stop: int) -> tuple[ImageRows, ...]:
        """Which rows of which images stand at these positions of a branch."""
        found = []
        for image in branch.context.images:
            first = max(start, image.start)
            last = min(stop, image.start + image.num_rows)
            if first < last:
                row = first - image.start
                found.append(ImageRows(image.digest, row, first - start, last - first))
        return tuple(found)

    def key(self, branch: Branch, index: int, block_size: int) -> bytes:
        """A name for the content of a full block: a digest of all ids and images up to its end.

        The request's adapter is in it, for what it computes is in the block.
        """
        begins = b"adapter %d" % self.request.adapter if self.request.adapter else b""
        while len(branch.keys) <= index:
            start = len(branch.keys) * block_size
            ids = self.token_ids(branch, start, start + block_size)
            content = hashlib.blake2b(branch.keys[-1] if branch.keys else begins, digest_size=16)
            content.update(array("q", ids).tobytes())
            for rows in self.images(branch, start, start + block_size):
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
            context=branch.context,
        )

    def candidates(self) -> list[Branch]:
        """A branch for each candidate of the present round, with nothing computed."""
        assert self.scoring is not None, "only a request with candidates scores any"
        return [Branch(list(ids[:-1]), context=self._context) for ids in self.scoring.round]
