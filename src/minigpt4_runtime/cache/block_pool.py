"""The holders of each block of the cache, and the blocks whose content can be found again.

Owns   the free blocks, the reference counts, and the content keys of full blocks.
Takes  block numbers and keys. A key names all tokens and images up to the end of a block.
Never  touches a tensor: the blocks' contents live with the runner.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks. A block without holders stays findable until it is reclaimed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._empty = set(range(num_blocks))
        self._unheld: OrderedDict[int, None] = OrderedDict()  # Findable; the oldest first.
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._next_start = 0

    @property
    def num_free(self) -> int:
        """How many blocks can be taken."""
        return len(self._empty) + len(self._unheld)

    def take(self, after: int | None, room: int) -> int:
        """A block to write to, held once: the one behind `after`, if that is empty.

        Blocks in one run can be read without copying. So a first block (`after` None) is chosen
        with `room` blocks before the next first one.
        """
        assert self.num_free, "the scheduler takes no more blocks than there are"
        if not self._empty:
            self._reclaim()
        block = None if after is None else after + 1
        if block not in self._empty:
            block = self._find_start(room)
        self._empty.remove(block)
        self._references[block] = 1
        return block

    def _reclaim(self) -> None:
        """Empty the least recently used blocks, several at once, which lie in a run more often."""
        for _ in range(min(len(self._unheld), max(1, self.num_blocks // 32))):
            block, _ = self._unheld.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._empty.add(block)

    def _find_start(self, room: int) -> int:
        block = self._next_start % self.num_blocks
        while block not in self._empty:
            block = (block + 1) % self.num_blocks
        self._next_start = block + room
        return block

    def num_holders(self, block: int) -> int:
        """How often a block is held. A block with several holders must not be written to."""
        return self._references[block]

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more."""
        for block in blocks:
            if self._references[block] == 0:
                del self._unheld[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let blocks go. Of those left findable, the last of a sequence is reclaimed first."""
        for block in reversed(tuple(blocks)):
            assert self._references[block] > 0, f"block {block} has no holder"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._unheld[block] = None
                else:
                    self._empty.add(block)

    def find(self, key: bytes) -> int | None:
        """The block with this content, if there is one. It is not held by finding it."""
        return self._block_of.get(key)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable, unless another block has the same content."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
