"""The plan of a step, as data.

Owns   StepPlan and its parts, and how a plan is sent. Made by the scheduler, executed by runners.
Never  holds a tensor: a plan is small enough to be sent to another process.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import islice

UNKNOWN_ID = -1  # In place of an id that the host has not read yet.
_FIELDS = 9  # Numbers of a slice, before its ids and blocks.


@dataclass(frozen=True)
class ImageRows:
    """Image embeddings in a slice: `num_rows` of an image from `image_row` on, at `slice_row`."""

    digest: str
    image_row: int
    slice_row: int
    num_rows: int


@dataclass(frozen=True)
class Slice:
    """Tokens of a sequence's branch of that number, from position `start` on.

    The blocks of a branch stand in row `table_row` of the block table. From place `first_block` on
    that row now has `new_blocks`; the places before it are as they were. The row then has a block
    for each token up to the last of this slice. The logits after its last `num_sampled` tokens are
    wanted. With a `choice`, its only id is UNKNOWN_ID: the step before has chosen it,
    from that row of its logits. `adapter` is the number of its request's adapter, 0 for none.
    """

    sequence_id: int
    branch: int
    start: int
    token_ids: tuple[int, ...]
    table_row: int
    first_block: int
    new_blocks: tuple[int, ...]
    images: tuple[ImageRows, ...] = ()
    num_sampled: int = 0
    choice: int | None = None
    adapter: int = 0


@dataclass(frozen=True)
class StepPlan:
    """Everything that one step computes. `copies` (from, to) are made before anything is written.

    Example: a prompt of 70 tokens and two sequences in mid-answer are 3 slices and 72 tokens.
    """

    slices: tuple[Slice, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """How many rows the language model computes."""
        return sum(len(each.token_ids) for each in self.slices)

    @property
    def has_unknown_ids(self) -> bool:
        """Whether it goes on from choices of the step before that the host has not read."""
        return any(each.choice is not None for each in self.slices)

    def encode(self) -> bytes:
        """As whole numbers, for the other ranks: without images and ids of sequences."""
        numbers = array("i", (len(self.copies),))
        for copied in self.copies:
            numbers.extend(copied)
        for each in self.slices:
            numbers.extend((
                each.branch, each.start, each.table_row, each.first_block, each.num_sampled,
                len(each.token_ids), len(each.new_blocks),
                -1 if each.choice is None else each.choice, each.adapter,
            ))  # fmt: skip
            numbers.extend(each.token_ids)
            numbers.extend(each.new_blocks)
        return numbers.tobytes()

    @classmethod
    def decode(cls, message: bytes) -> StepPlan:
        """Read what `encode` gave. All ids of sequences are -1."""
        numbers = iter(array("i", message))
        copies = tuple((next(numbers), next(numbers)) for _ in range(next(numbers)))
        slices = []
        while fields := tuple(islice(numbers, _FIELDS)):
            branch, start, row, first_block, num_sampled, num_ids, num_blocks, *last = fields
            ids, blocks = tuple(islice(numbers, num_ids)), tuple(islice(numbers, num_blocks))
            choice, adapter = None if last[0] < 0 else last[0], last[1]
            told = (branch, start, ids, row, first_block, blocks)
            slices.append(Slice(-1, *told, num_sampled=num_sampled, choice=choice, adapter=adapter))
        return cls(tuple(slices), copies)
