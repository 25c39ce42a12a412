"""Stands for the runner without torch: it remembers what each cache slot holds.

Owns   a chain of states by cache slot. A token's state depends on all tokens and pictures before
       it, as its keys and values do; a slot also keeps the state before it, so that a slot that
       was overwritten, never written or written for another beginning breaks the chain.
Takes  StepPlans and keeps to their contract: copies first, then reads, then writes.
Gives  the state at each sampled row; `choose` makes of it what a model and a sampler would, and
       `answer_without_cache` is the slow twin of it all.
"""

import zlib

from minigpt4_runtime.engine.beam import BeamSearch, Continuation
from minigpt4_runtime.engine.request import Heard
from minigpt4_runtime.engine.scheduler import Token
from minigpt4_runtime.engine.scoring import Scored
from minigpt4_runtime.engine.sequence import Branch

VOCABULARY, END, PLACEHOLDER = 11, 2, 11
NOTHING_BEFORE = 0


class CacheFault(AssertionError):
    """A plan reads what is not there, or writes to what others read."""


def state_after(state, identity):
    """The state of one more token: an id, or a picture's digest and row."""
    if isinstance(identity, tuple):
        digest, row = identity
        identity = (zlib.crc32(digest.encode()), row)
    return hash((state, identity))  # Of whole numbers alone: the same in every process.


def likely_token(state):
    return state % VOCABULARY


def log_probability(state, token_id):
    """In sixteenths: sums of them are exact, and often equal."""
    return -(1 + hash((state, token_id)) % 64) / 16


def best_continuations(branches, states, num_beams):
    """The best 2·num_beams ways on from these states, one for each branch."""
    every = [
        Continuation(branch.score + log_probability(state, token_id), index, token_id)
        for index, (branch, state) in enumerate(zip(branches, states, strict=True))
        for token_id in range(VOCABULARY)
    ]
    return sorted(every, key=lambda each: -each.score)[: 2 * num_beams]


def choose(sequence, states):
    """What a model, a processor of its branches and a sampler say to a sequence's states."""
    if sequence.scoring:
        return Scored(tuple(map(log_probability, states, sequence.scoring.targets)))
    if sequence.search is None:
        return Token(likely_token(sum(states)))
    return best_continuations(sequence.branches, states, sequence.max_branches)


class SumWatch:
    """Ends an answer once its ids add up to a multiple of `divisor`."""

    def __init__(self, divisor, total=0):
        self._divisor = divisor
        self._total = total

    def feed(self, token_id, *, is_last):
        self._total += token_id
        return Heard(self._total % self._divisor == 0, (self._total, is_last))

    def fork(self):
        return SumWatch(self._divisor, self._total)


class FakeRunner:
    """Executes plans on states."""

    def __init__(self, block_size):
        self._block_size = block_size
        self._slots = {}  # (block, offset) → (the state before, the state).
        self._table = {}  # Row of the block table → its blocks.

    def execute(self, plan):
        """The states at the sampled tokens, in the order of the slices."""
        self._note_blocks(plan)
        self._check_writers(plan)
        self._copy_blocks(plan)
        befores = [self._read(each) for each in plan.slices]
        states = [self._write(*pair) for pair in zip(plan.slices, befores, strict=True)]
        counts = [len(each.token_ids) - each.num_sampled for each in plan.slices]
        return [each for some, start in zip(states, counts, strict=True) for each in some[start:]]

    def fail(self, plan):
        """What a step leaves behind that breaks down in the middle: whatever it could write."""
        self._note_blocks(plan)
        self._copy_blocks(plan)
        for each in plan.slices:
            for position in range(each.start, each.start + len(each.token_ids)):
                self._slots[self._slot(each, position)] = ("broken", "broken")

    def _slot(self, each, position):
        index, offset = divmod(position, self._block_size)
        return self._blocks(each)[index], offset

    def _note_blocks(self, plan):
        for each in plan.slices:
            row = self._table.setdefault(each.table_row, [])
            if each.first_block > len(row):
                raise CacheFault(f"{each} leaves a hole in its row of the block table")
            row[each.first_block :] = each.new_blocks

    def _blocks(self, each):
        """The blocks of a slice, as far as all plans so far have told them."""
        return self._table[each.table_row]

    def _check_writers(self, plan):
        for each in plan.slices:
            stop = each.start + len(each.token_ids)
            blocks = self._blocks(each)
            if len(blocks) != -(-stop // self._block_size) or not each.token_ids:
                raise CacheFault(f"{each} has not the blocks of its tokens")
            written = set(blocks[each.start // self._block_size :])
            for other in plan.slices:
                if other is not each and written.intersection(self._blocks(other)):
                    raise CacheFault(f"{each} writes to what {other} reads")

    def _copy_blocks(self, plan):
        targets = [target for _, target in plan.copies]
        if len(set(targets)) < len(targets):
            raise CacheFault(f"two blocks are copied to one: {plan.copies}")
        copied = {}
        for source, target in plan.copies:
            for offset in range(self._block_size):
                copied[target, offset] = self._slots.get((source, offset))
        self._slots.update(copied)

    def _read(self, each):
        """The state before a slice, by way of all slots before it."""
        state = NOTHING_BEFORE
        for position in range(each.start):
            before, after = self._slots.get(self._slot(each, position)) or (None, None)
            if before != state:
                raise CacheFault(f"position {position} of {each} is stale")
            state = after
        return state

    def _write(self, each, state):
        states = []
        for position, identity in enumerate(_identities(each), start=each.start):
            before, state = state, state_after(state, identity)
            self._slots[self._slot(each, position)] = (before, state)
            states.append(state)
        return states


def _identities(each):
    """What stands at each position of a slice: an id, or a row of a picture."""
    identities = list(each.token_ids)
    for rows in each.images:
        for index in range(rows.num_rows):
            at = rows.slice_row + index
            assert identities[at] == PLACEHOLDER, f"{each} puts {rows} over text"
            identities[at] = (rows.digest, rows.image_row + index)
    assert PLACEHOLDER not in identities, f"{each} leaves out a picture's row"
    return identities


def answer_without_cache(request, max_new_tokens):
    """The long way to an answer: no cache, no blocks, every branch from its first token on.

    Of a request with candidates, the only event's note.
    """
    if request.candidates:
        return [tuple(_score_without_cache(request, each) for each in request.candidates)]
    if request.sampling.num_beams > 1:
        return _search_without_cache(request, max_new_tokens)
    watch, answer = request.watch.fork(), []
    while len(answer) < max_new_tokens:
        prompts = (request, *request.beside)
        answer.append(likely_token(sum(_state_of(each, answer) for each in prompts)))
        if watch.feed(answer[-1], is_last=False).ends or answer[-1] == END:
            break
    return answer


def _score_without_cache(request, candidate):
    return sum(
        log_probability(_state_of(request, candidate[:place]), token_id)
        for place, token_id in enumerate(candidate)
    )


def _search_without_cache(request, max_new_tokens):
    num_beams = request.sampling.num_beams
    search = BeamSearch(num_beams, request.sampling.length_penalty, max_new_tokens)
    branches = [Branch()]

    def ends(each):
        if each.token_id == END:
            return True
        watch = request.watch.fork()
        for token_id in branches[each.branch].answer:
            watch.feed(token_id, is_last=False)
        return watch.feed(each.token_id, is_last=False).ends

    while not search.is_done:
        states = [_state_of(request, branch.answer) for branch in branches]
        continuations = best_continuations(branches, states, num_beams)
        going_on = search.choose(continuations, [branch.answer for branch in branches], ends)
        branches = [
            Branch([*branches[each.branch].answer, each.token_id], each.score) for each in going_on
        ]
    return list(search.best().token_ids)


def _state_of(request, answer):
    token_ids, starts = request.token_ids, [picture.start for picture in request.images]
    if getattr(request, "window", None):
        kept = request.window.fit(len(answer))
        token_ids, starts, answer = kept.token_ids, kept.image_starts, answer[kept.num_answer :]
    identities = [*token_ids, *answer]
    pictures = request.images[len(request.images) - len(starts) :]
    for picture, start in zip(pictures, starts, strict=True):
        for row in range(picture.num_rows):
            identities[start + row] = (picture.digest, row)
    state = NOTHING_BEFORE
    for identity in identities:
        state = state_after(state, identity)
    return state
