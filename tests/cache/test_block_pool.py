"""Blocks are counted, lie in runs, and stay findable as long as nobody needs them. No torch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.cache.block_pool import BlockPool


def take(pool, count, *, after=None, room=1):
    """As many blocks as asked, one behind the other."""
    blocks = []
    for _ in range(count):
        after = pool.take(after, room)
        blocks.append(after)
    return blocks


def publish(pool, blocks, name):
    """Make the blocks of a sequence findable by its name and their place in it."""
    for index, block in enumerate(blocks):
        pool.publish(block, f"{name}{index}".encode())


def found(pool, *names):
    return [name for name in names if pool.find(name.encode()) is not None]


def test_a_block_that_is_taken_is_held_once_and_not_free():
    pool = BlockPool(4)
    block = pool.take(None, room=1)
    assert pool.num_holders(block) == 1
    assert pool.num_free == 3
    pool.release([block])
    assert pool.num_holders(block) == 0
    assert pool.num_free == 4


def test_a_block_is_free_once_all_who_hold_it_let_go():
    pool = BlockPool(4)
    blocks = take(pool, 2)
    pool.hold(blocks)
    pool.hold(blocks[:1])
    assert [pool.num_holders(block) for block in blocks] == [3, 2]
    pool.release(blocks)
    pool.release(blocks)
    assert [pool.num_holders(block) for block in blocks] == [1, 0]
    assert pool.num_free == 3


def test_a_block_without_a_holder_cannot_be_released():
    pool = BlockPool(4)
    block = pool.take(None, room=1)
    pool.release([block])
    with pytest.raises(AssertionError, match=f"block {block} has no holder"):
        pool.release([block])


def test_all_blocks_can_be_taken_and_none_twice():
    pool = BlockPool(9)
    blocks = [pool.take(None, room=4) for _ in range(9)]
    assert sorted(blocks) == list(range(9))
    assert pool.num_free == 0


def test_the_next_block_of_a_sequence_is_the_one_behind():
    pool = BlockPool(20)
    first = pool.take(None, room=5)
    assert take(pool, 4, after=first) == [first + 1, first + 2, first + 3, first + 4]


def test_sequences_that_grow_in_turns_lie_in_runs_of_their_own():
    pool = BlockPool(24)
    sequences = [[pool.take(None, room=6)] for _ in range(4)]
    for _ in range(5):
        for blocks in sequences:
            blocks.append(pool.take(blocks[-1], room=6 - len(blocks)))
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 6))


def test_where_the_block_behind_is_held_another_is_taken():
    pool = BlockPool(4)
    first, second, third = take(pool, 3)
    assert pool.take(first, room=1) not in (first, second, third)


def test_behind_the_last_block_there_is_none():
    pool = BlockPool(3)
    blocks = take(pool, 3)
    pool.release(blocks[:1])
    assert blocks[-1] == 2
    assert pool.take(blocks[-1], room=1) == blocks[0]


def test_what_was_published_is_found_held_or_not():
    pool = BlockPool(4)
    (block,) = take(pool, 1)
    assert pool.find(b"a0") is None
    publish(pool, [block], "a")
    assert pool.find(b"a0") == block
    pool.release([block])
    assert pool.find(b"a0") == block
    assert pool.num_free == 4


def test_finding_does_not_hold():
    pool = BlockPool(4)
    (block,) = take(pool, 1)
    publish(pool, [block], "a")
    pool.release([block])
    pool.find(b"a0")
    assert pool.num_holders(block) == 0
    pool.hold([block])
    assert pool.num_holders(block) == 1
    assert pool.num_free == 3


def test_a_found_block_that_is_held_again_is_not_given_out():
    pool = BlockPool(3)
    blocks = take(pool, 3)
    publish(pool, blocks, "a")
    pool.release(blocks)
    pool.hold(blocks[1:2])
    assert sorted(take(pool, 2)) == [blocks[0], blocks[2]]
    assert found(pool, "a0", "a1", "a2") == ["a1"]


def test_what_holds_nothing_is_taken_before_what_can_be_found():
    pool = BlockPool(4)
    kept, *others = take(pool, 4)
    publish(pool, [kept], "a")
    pool.release([kept, *others])
    assert sorted(take(pool, 3)) == others
    assert found(pool, "a0") == ["a0"]


def test_the_least_recently_used_sequence_is_reclaimed_first():
    pool = BlockPool(3)
    blocks = take(pool, 3)
    for block, name in zip(blocks, "abc", strict=True):
        publish(pool, [block], name)
    pool.release(blocks[1:2])
    pool.release(blocks[0:1])
    pool.release(blocks[2:3])
    pool.hold(blocks[1:2])
    pool.release(blocks[1:2])
    for left in (["b0", "c0"], ["b0"], []):
        pool.take(None, room=1)
        assert found(pool, "a0", "b0", "c0") == left


def test_the_last_block_of_a_sequence_is_reclaimed_before_its_first():
    pool = BlockPool(3)
    blocks = take(pool, 3)
    publish(pool, blocks, "a")
    pool.release(blocks)
    for left in (["a0", "a1"], ["a0"], []):
        pool.take(None, room=1)
        assert found(pool, "a0", "a1", "a2") == left


def test_a_large_pool_reclaims_a_run_at_once():
    pool = BlockPool(128)
    blocks = take(pool, 128)
    publish(pool, blocks, "a")
    pool.release(blocks)
    first = pool.take(None, room=4)
    assert take(pool, 3, after=first) == [first + 1, first + 2, first + 3]
    assert pool.find(b"a123") is not None
    assert pool.find(b"a124") is None


def test_of_the_same_content_the_first_stays_findable():
    pool = BlockPool(4)
    first, second = take(pool, 2)
    publish(pool, [first], "a")
    publish(pool, [second], "a")
    assert pool.find(b"a0") == first
    pool.release([second])
    assert pool.find(b"a0") == first
    # The second one is empty again: no other has to be given up for it.
    assert sorted(take(pool, 3)) == sorted({0, 1, 2, 3} - {first})
    assert pool.find(b"a0") == first


def test_content_can_be_published_anew_once_it_was_reclaimed():
    pool = BlockPool(2)
    first, second = take(pool, 2)
    publish(pool, [first], "a")
    pool.release([first])
    assert pool.take(None, room=1) == first
    assert pool.find(b"a0") is None
    publish(pool, [second], "a")
    assert pool.find(b"a0") == second


# --- random loads -------------------------------------------------------------------------------


class CheckedPool:
    """A pool, and beside it the plainest account of what it should do."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks)
        self.sequences = []
        self.findable = {}  # Key → block.
        self.unheld = []  # Of those that can be found, the least recently used first.

    def holders(self):
        return Counter(block for blocks in self.sequences for block in blocks)

    def take(self, number, key):
        """Let a sequence grow, or begin one."""
        holders, num_free = self.holders(), self.pool.num_free
        if num_free:
            blocks = pick([[], *self.sequences], number)
            block = self.pool.take(blocks[-1] if blocks else None, room=1 + number % 5)
            assert holders[block] == 0, f"{block} was given out twice"
            self._check_reclaimed(is_scarce=num_free == len(self.unheld))
            assert block not in self.findable.values()
            if not blocks:
                self.sequences.append(blocks)
            blocks.append(block)

    def share(self, number, key):
        """Let another sequence hold the same blocks."""
        if self.sequences:
            blocks = pick(self.sequences, number)
            self.pool.hold(blocks)
            self.sequences.append(list(blocks))

    def publish(self, number, key):
        """Publish a sequence's last block, perhaps as what another one holds already."""
        if self.sequences:
            block = pick(self.sequences, number)[-1]
            self.pool.publish(block, key)
            if block not in self.findable.values():
                self.findable.setdefault(key, block)

    def reuse(self, number, key):
        """Begin a sequence from a block that can be found."""
        if key in self.findable:
            block = self.findable[key]
            self.pool.hold([block])
            self.sequences.append([block])
            if block in self.unheld:
                self.unheld.remove(block)

    def release(self, number, key):
        """Let a whole sequence go."""
        if self.sequences:
            blocks = self.sequences.pop(number % len(self.sequences))
            self.pool.release(blocks)
            left = [block for block in blocks if block in self.findable.values()]
            self.unheld += [block for block in reversed(left) if not self.holders()[block]]

    def check(self):
        holders = self.holders()
        assert self.pool.num_free == self.num_blocks - len(holders)
        assert [self.pool.num_holders(block) for block in range(self.num_blocks)] == [
            holders[block] for block in range(self.num_blocks)
        ]
        assert {key: self.pool.find(key) for key in KEYS if self.pool.find(key) is not None} == (
            self.findable
        )

    def _check_reclaimed(self, *, is_scarce):
        """The least recently used are forgotten first, and only where nothing else is free."""
        lost = [block for key, block in self.findable.items() if self.pool.find(key) is None]
        assert set(lost) == set(self.unheld[: len(lost)])
        assert bool(lost) == is_scarce
        del self.unheld[: len(lost)]
        self.findable = {key: b for key, b in self.findable.items() if b not in lost}


def pick(options, number):
    return options[number % len(options)]


KEYS = [bytes([number]) for number in range(8)]
USES = st.tuples(
    st.sampled_from(("take", "take", "take", "share", "publish", "publish", "reuse", "release")),
    st.integers(0, 59),
    st.sampled_from(KEYS),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from((1, 2, 5, 9)), st.lists(USES, max_size=60))
def test_no_block_is_given_out_twice_and_none_is_lost(num_blocks, uses):
    checked = CheckedPool(num_blocks)
    for name, number, key in uses:
        getattr(checked, name)(number, key)
        checked.check()
