"""What the next step computes, as data.

Owns   StepPlan and its parts. Made by the scheduler, executed by the runner.
Never  holds a tensor: a plan is small enough to be sent to another process.
"""

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
