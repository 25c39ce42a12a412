"""Which tokens of which sequences run in the next step.

Owns   the waiting and running queues and the block pool.
Takes  sequences in, sampled tokens back; gives a StepPlan out.
Never  touches tensors, devices or text.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from minigpt4_runtime.cache.block_pool import BlockPool
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.beam import Continuation, Hypothesis
from minigpt4_runtime.engine.plan import UNKNOWN_ID, Slice, StepPlan
from minigpt4_runtime.engine.request import StopWatch, TokenEvent
from minigpt4_runtime.engine.scoring import Scored
from minigpt4_runtime.engine.sequence import Branch, Sequence
from minigpt4_runtime.messages import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Token:
    """The sampler's choice for a sequence with one answer."""

    token_id: int
    logprobs: TokenLogprobs | None = None


# For a beam search: the best continuations of all its branches, best first.
NextTokens = Token | list[Continuation] | Scored


@dataclass
class _Draft:
    """A plan while it is made."""

    budget: int
    slices: list[Slice] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Serves sequences in order of arrival, within the token budget, `max_running` and the blocks.

    There is no prefill and no decode phase: each branch has tokens that are computed and tokens
    that are not, and a step lets the first catch up with the second.
    """

    def __init__(self, config: EngineConfig, *, num_blocks: int, eos_id: int) -> None:
        self._config = config
        self._block_size = config.block_size
        self._pool = BlockPool(num_blocks)
        self._eos_id = eos_id
        self._waiting: deque[Sequence] = deque()
        # By id, the oldest first. All are older than the waiting ones.
        self._running: dict[int, Sequence] = {}
        self._free_rows = list(range(config.max_running))  # Of the block table.
        self.max_running = config.max_running
        self.num_preempted = 0
        self.num_reused_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that is not finished."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold blocks, the oldest first."""
        return tuple(self._running.values())

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The sequences that hold none, the next first."""
        return tuple(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """How many blocks no running sequence holds."""
        return self._pool.num_free

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn. Ids of sequences only ever grow."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its blocks."""
        if self._running.pop(sequence.id, None) is None and sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)

    def preempt_all(self) -> None:
        """Take the blocks of all running sequences, whose content may be wrong."""
        for sequence in reversed(self.running):
            self._preempt(sequence)
        for sequence in self._waiting:
            sequence.choice = None  # It is chosen again, and comes to the same.

    # --- plan ---------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Choose the next step's tokens and give them blocks.

        Sequences in mid-answer come first, so that no long prompt stalls them; then the prompts of
        those that run, then those that wait.
        """
        draft = _Draft(self._config.max_step_tokens)
        num_preempted = self.num_preempted
        short = False
        for is_mid_answer in (True, False):
            for sequence in self.running:
                is_running = sequence.id in self._running
                if is_running and (set(sequence.missing()) == {1}) == is_mid_answer:
                    short |= not self._continue(sequence, draft)
        # Waiting sequences are newer than running ones: while those lack blocks, none joins.
        if not short and num_preempted == self.num_preempted:
            while self._waiting and draft.budget and self._admit(draft):
                pass
        return StepPlan(tuple(draft.slices), tuple(draft.copies))

    def _continue(self, sequence: Sequence, draft: _Draft) -> bool:
        """Plan a running sequence's next tokens. False where it lacks blocks for any."""
        counts = self._counts(sequence, draft.budget)
        if not any(counts):
            return True
        while self._new_blocks(sequence, counts) > self._pool.num_free:
            planned = {each.sequence_id for each in draft.slices}
            youngest = self.running[-1]
            victim = next(each for each in reversed(self.running) if each.id not in planned)
            # If younger sequences are planned already, it keeps its blocks and waits.
            if victim is sequence and sequence is not youngest:
                return False
            assert len(self._running) > 1, "a sequence that fits alone never lacks blocks alone"
            self._preempt(victim)
            if victim is sequence:
                return False
        self._write(sequence, counts, draft)
        return True

    def _admit(self, draft: _Draft) -> bool:
        """Let the sequence that has waited longest run, if it fits."""
        sequence = self._waiting[0]
        branches = sum(each.max_branches for each in self._running.values()) + sequence.max_branches
        if self._running and branches > self.max_running:
            return False
        roots, needed = sequence.roots, 0
        for root in roots:
            self._reuse(sequence, root)
            needed += self._num_blocks(sequence.num_tokens(root)) - len(root.blocks)
        # One more for each running one, or the new sequence would soon be preempted again.
        if self._running and needed + len(self._running) > self._pool.num_free:
            self._release(sequence)
            return False
        self.num_reused_tokens += sum(root.num_computed for root in roots)
        self._waiting.popleft()
        self._running[sequence.id] = sequence
        return self._continue(sequence, draft)

    def _reuse(self, sequence: Sequence, branch: Branch) -> None:
        """Start from blocks that hold the same beginning; at least one token is left to compute."""
        if not self._config.prefix_cache:
            return
        for index in range(sequence.most_reused(branch) // self._block_size):
            block = self._pool.find(sequence.key(branch, index, self._block_size))
            if block is None:
                break
            self._pool.hold([block])
            branch.blocks.append(block)
            branch.num_computed += self._block_size
        self._fork_trunk(sequence)

    def _counts(self, sequence: Sequence, budget: int) -> list[int]:
        """How many tokens of each branch to compute now.

        What is chosen needs all branches at once: unless all of them reach their ends in this
        step, each leaves its last token for a later one. Candidates need not wait for each other.
        """
        trunk = sequence.branches[0]
        if len(sequence.branches) > 1 and trunk.num_computed < sequence.num_shared:
            return [min(budget, sequence.num_shared - trunk.num_computed)]
        missing = sequence.missing()
        if sum(missing) <= budget:
            return missing
        if len(missing) == 1:
            return [budget]
        counts = []
        left_over = 0 if sequence.scoring else 1
        for each in missing:
            counts.append(min(budget, each - left_over))
            budget -= counts[-1]
        return counts

    def _new_blocks(self, sequence: Sequence, counts: list[int]) -> int:
        """How many blocks the next tokens take, copies of shared ones included."""
        needed, writers = 0, Counter[int]()
        for branch, count in zip(sequence.branches, counts, strict=False):
            if count:
                needed += self._num_blocks(branch.num_computed + count) - len(branch.blocks)
                writers.update(self._written_block(branch))
        # Of the holders of a block that write to it, the last one keeps it without a copy.
        copies = (min(n, self._pool.num_holders(block) - 1) for block, n in writers.items())
        return needed + sum(copies)

    def _written_block(self, branch: Branch) -> list[int]:
        """The block that the next token goes to, if it has one already."""
        index = branch.num_computed // self._block_size
        return branch.blocks[index : index + 1]

    def _write(self, sequence: Sequence, counts: list[int], draft: _Draft) -> None:
        """Put the tokens into the plan, in blocks with no other holder."""
        nums_sampled = self._nums_sampled(sequence, counts)
        for index, (branch, count) in enumerate(zip(sequence.branches, counts, strict=False)):
            if not count:
                continue
            start, stop = branch.num_computed, branch.num_computed + count
            self._own_written_block(sequence, branch, draft)
            while len(branch.blocks) < self._num_blocks(stop):
                branch.blocks.append(self._take(sequence, branch, branch.blocks))
            if branch.table_row is None:
                branch.table_row = self._free_rows.pop()
            draft.slices.append(
                Slice(
                    sequence.id,
                    index,
                    start,
                    sequence.token_ids(branch, start, stop),
                    branch.table_row,
                    branch.num_told,
                    tuple(branch.blocks[branch.num_told :]),
                    sequence.images(branch, start, stop),
                    nums_sampled[index],
                    sequence.choice,
                    sequence.request.adapter,
                )
            )
            branch.num_told = len(branch.blocks)
            draft.budget -= count

    def _nums_sampled(self, sequence: Sequence, counts: list[int]) -> list[int]:
        """How many of each branch's next tokens have logits that are wanted."""
        if sequence.scoring is None:
            return [int(sum(counts) == sum(sequence.missing()))] * len(counts)
        first_row, spans, nums_sampled = sequence.num_prompt - 1, [], []
        for place, (branch, count) in enumerate(zip(sequence.branches, counts, strict=False)):
            stop = branch.num_computed + count
            first = max(first_row, branch.num_computed)
            nums_sampled.append(max(0, stop - first))
            if nums_sampled[-1]:
                spans.append((place, first - first_row, stop - first))
        sequence.scoring.plan(spans)
        return nums_sampled

    def _own_written_block(self, sequence: Sequence, branch: Branch, draft: _Draft) -> None:
        for block in self._written_block(branch):
            if self._pool.num_holders(block) > 1:
                index = branch.num_computed // self._block_size
                own = self._take(sequence, branch, branch.blocks[:index])
                draft.copies.append((block, own))
                self._pool.release([block])
                branch.blocks[index] = own
                branch.num_told = min(branch.num_told, index)

    def _take(self, sequence: Sequence, branch: Branch, before: list[int]) -> int:
        """A block behind those before it, with room for the longest answer of the branch."""
        whole = self._num_blocks(sequence.most_tokens(branch))
        return self._pool.take(before[-1] if before else None, room=whole - len(before))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it waits again, before all younger ones."""
        del self._running[sequence.id]
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        for branch in sequence.branches:
            self._pool.release(branch.blocks)
            branch.blocks, branch.num_computed = [], 0
            self._free_row(branch)

    def _free_row(self, branch: Branch) -> None:
        if branch.table_row is not None:
            self._free_rows.append(branch.table_row)
        branch.table_row, branch.num_told = None, 0

    # --- commit -------------------------------------------------------------------------------

    def sampled(self, plan: StepPlan) -> list[tuple[int, Sequence]]:
        """The sequences whose logits a plan asks for, each behind its first row of the logits.

        What has ended since the plan was made is left out.
        """
        rows: dict[int, int] = {}
        row = 0
        for each in plan.slices:
            if each.num_sampled:
                rows.setdefault(each.sequence_id, row)
            row += each.num_sampled
        return [(row, self._running[i]) for i, row in rows.items() if i in self._running]

    def commit(self, plan: StepPlan) -> int:
        """Note what a plan has computed, and make full blocks findable; gives how many tokens.

        Its sampled tokens go to `extend`. What has ended since the plan was made counts no more.
        """
        num_tokens = 0
        for piece in plan.slices:
            sequence = self._running.get(piece.sequence_id)
            if sequence is None:
                continue
            num_tokens += len(piece.token_ids)
            branch = sequence.branches[piece.branch]
            before, branch.num_computed = branch.num_computed, piece.start + len(piece.token_ids)
            if self._config.prefix_cache:
                full = range(before // self._block_size, branch.num_computed // self._block_size)
                for index in full:
                    key = sequence.key(branch, index, self._block_size)
                    self._pool.publish(branch.blocks[index], key)
            if len(sequence.branches) > 1:
                self._fork_trunk(sequence)
        return num_tokens

    def expect(self, placed: Collection[tuple[int, Sequence]]) -> bool:
        """Let the next plan go on from what these are choosing, if it needs only their next ids.

        `extend` is to be called once these are known, whatever has become of the sequences. One
        that gets its last id has no more to compute.
        """
        if not all(sequence.can_be_ahead() for _, sequence in placed):
            return False
        for row, sequence in placed:
            if len(sequence.branches[0].answer) + 1 < sequence.max_new_tokens:
                sequence.choice = row
        return True

    def extend(self, sequence: Sequence, choice: NextTokens) -> tuple[TokenEvent, ...]:
        """Let a sequence grow, and give its new tokens. The last event may say why it ends.

        This is the only place where a sequence grows. The caller removes one that has ended.
        """
        sequence.choice = None
        if isinstance(choice, Token):
            return (self._extend_one(sequence, choice),)
        if isinstance(choice, Scored):
            return self._extend_scored(sequence, choice)
        return self._extend_beams(sequence, choice)

    def _slide(self, sequence: Sequence) -> None:
        """Let what does not fit into the sequence's window leave it."""
        if sequence.slide():
            self._release(sequence)
            self._reuse(sequence, sequence.branches[0])
            self.num_reused_tokens += sequence.branches[0].num_computed

    def _fork_trunk(self, sequence: Sequence) -> None:
        """Let all branches start from what they share of the prompt, as soon as it is computed."""
        trunk, *others = sequence.branches
        if not others or others[0].blocks or not trunk.num_computed == sequence.num_shared > 0:
            return
        for branch in others:
            self._pool.hold(trunk.blocks)
            branch.blocks, branch.num_computed = list(trunk.blocks), trunk.num_computed

    def _extend_one(self, sequence: Sequence, token: Token) -> TokenEvent:
        branch = sequence.branches[0]
        for each in sequence.branches:
            each.say(token.token_id)
        is_end = token.token_id == self._eos_id and not sequence.request.sampling.ignore_eos
        is_last = is_end or len(branch.answer) == sequence.max_new_tokens
        heard = branch.watch.feed(token.token_id, is_last=is_last)
        reason: FinishReason | None = "length" if is_last else None
        if is_end or heard.ends:
            reason = "stop"
        if reason is None:
            self._slide(sequence)
        return TokenEvent(token.token_id, reason, token.logprobs, heard.note)

    def _extend_scored(self, sequence: Sequence, scored: Scored) -> tuple[TokenEvent, ...]:
        scoring, before = sequence.scoring, sequence.branches
        assert scoring is not None, "only a request with candidates is scored"
        scoring.take(scored)
        if any(sequence.missing()):
            return ()
        if not scoring.begin_next_round():
            return (TokenEvent(UNKNOWN_ID, "stop", note=scoring.sums),)
        # Whole blocks of the prompt alone: the next one may be findable with a candidate's ids.
        num_kept = (sequence.num_prompt - 1) // self._block_size
        sequence.branches = sequence.candidates()
        trunk = sequence.branches[0]
        trunk.blocks, trunk.num_computed = before[0].blocks[:num_kept], num_kept * self._block_size
        self._pool.hold(trunk.blocks)
        self._give_up(before)
        self._fork_trunk(sequence)
        return ()

    def _give_up(self, branches: list[Branch]) -> None:
        for branch in branches:
            self._pool.release(branch.blocks)
            self._free_row(branch)

    def _extend_beams(
        self, sequence: Sequence, continuations: list[Continuation]
    ) -> tuple[TokenEvent, ...]:
        search = sequence.search
        assert search is not None, "only a beam search has continuations"
        parents = sequence.branches

        def ends(each: Continuation) -> bool:
            if each.token_id == self._eos_id and not sequence.request.sampling.ignore_eos:
                return True
            watch = parents[each.branch].watch.fork()
            return watch.feed(each.token_id, is_last=False).ends

        going_on = search.choose(continuations, [parent.answer for parent in parents], ends)
        if search.is_done:
            return _tell(search.best(), sequence.request.watch.fork())
        sequence.branches = [self._grow(sequence, parents[each.branch], each) for each in going_on]
        for branch in sequence.branches:
            self._pool.hold(branch.blocks)
        self._give_up(parents)
        self._slide(sequence)
        return ()

    def _grow(self, sequence: Sequence, parent: Branch, continuation: Continuation) -> Branch:
        branch = sequence.fork(parent)
        # The first of its children goes on in its row of the block table.
        branch.table_row, branch.num_told = parent.table_row, parent.num_told
        parent.table_row, parent.num_told = None, 0
        branch.say(continuation.token_id)
        branch.score = continuation.score
        branch.watch.feed(continuation.token_id, is_last=False)
        return branch


def _tell(answer: Hypothesis, watch: StopWatch) -> tuple[TokenEvent, ...]:
    """All of an answer at once, read by a new watch."""
    *ids, last = answer.token_ids
    events = [TokenEvent(i, None, None, watch.feed(i, is_last=False).note) for i in ids]
    note = watch.feed(last, is_last=True).note
    return (*events, TokenEvent(last, answer.finish_reason, None, note))
