"""Steps as kernels take them, laid out one slot after the other: the slow twin of StepBuffers."""

from typing import NamedTuple

import torch

from minigpt4_runtime.kernels.contracts import SequenceRows, StepBatch


class Cached(NamedTuple):
    """Rows of a step that belong to one sequence, and the blocks that hold it."""

    first_row: int
    num_rows: int
    num_tokens: int
    blocks: tuple[int, ...]


def batch_of(sequences: list[Cached], block_size: int, device="cpu") -> StepBatch:
    """Each sequence has the row of the block table of its number; behind its blocks lies 0."""
    width = max(len(each.blocks) for each in sequences) + 1
    table = [[*each.blocks, *[0] * (width - len(each.blocks))] for each in sequences]
    slots = [
        each.blocks[position // block_size] * block_size + position % block_size
        for each in sequences
        for position in range(each.num_tokens - each.num_rows, each.num_tokens)
    ]
    rows = []
    for number, each in enumerate(sequences):
        first = each.blocks[0]
        is_run = each.blocks == tuple(range(first, first + len(each.blocks)))
        rows.append(
            SequenceRows(
                each.first_row, each.num_rows, each.num_tokens, number, first if is_run else None
            )
        )
    return StepBatch(
        tuple(rows),
        torch.tensor(slots, device=device),
        torch.tensor([each.num_tokens for each in sequences], device=device),
        torch.arange(len(sequences), device=device),
        torch.tensor(table, dtype=torch.int32, device=device),
    )
