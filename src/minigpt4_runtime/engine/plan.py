"""What the next step computes, as data.

Owns   StepPlan and its parts, and how a plan is sent. Made by the scheduler, executed by runners.
Never  holds a tensor: a plan is small enough to be sent to another process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageRows:
    """Rows of a picture that stand in a slice: `num_rows` from `image_row` on, at `slice_row`."""

    digest: str
    image_row: int
    slice_row: int
    num_rows: int


@dataclass(frozen=True)
class Slice:
    """Tokens of a sequence's branch of that number, from position `start` on.

    `blocks` hold the branch from its first token to the last of this slice. `is_sampled` says that
    the logits after its last token are wanted.
    """

    sequence_id: int
    branch: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    images: tuple[ImageRows, ...] = ()
    is_sampled: bool = False


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

    def encode(self) -> bytes:
        """For the ranks that hold no image side: all but the pictures."""
        slices = [
            (each.sequence_id, each.branch, each.start, each.token_ids, each.blocks)
            for each in self.slices
        ]
        sampled = [each.is_sampled for each in self.slices]
        return json.dumps((slices, sampled, self.copies), separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, message: bytes) -> StepPlan:
        """What was encoded."""
        slices, sampled, copies = json.loads(message)
        return cls(
            tuple(
                Slice(sequence_id, branch, start, tuple(ids), tuple(blocks), is_sampled=is_sampled)
                for (sequence_id, branch, start, ids, blocks), is_sampled in zip(
                    slices, sampled, strict=True
                )
            ),
            tuple((source, target) for source, target in copies),
        )
