"""Steps as kernels take them, laid out one slot after the other: the slow twin of StepBuffers.

Also what tests of kernels draw at random.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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


def draw(generator, *shape, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).float()


def lay_out(lengths, block_size, generator) -> list[Cached]:
    """Every other sequence lies in one run of blocks, the others wherever there is room."""
    needs = [-(-num_tokens // block_size) for num_tokens, _ in lengths]
    # Nobody has the first block: tables are padded with its number.
    free = torch.randperm(sum(needs[0::2]) + 2, generator=generator) + 1 + sum(needs[1::2])
    free, first_of_run, row, sequences = free.tolist(), 1, 0, []
    for index, ((num_tokens, num_rows), need) in enumerate(zip(lengths, needs, strict=True)):
        if index % 2:
            blocks = range(first_of_run, first_of_run + need)
            first_of_run += need
        else:
            blocks = [free.pop() for _ in range(need)]
        sequences.append(Cached(row, num_rows, num_tokens, tuple(blocks)))
        row += num_rows
    return sequences


def slots_before(sequences, block_size) -> list[int]:
    """The slots that were filled before this step."""
    return [
        each.blocks[i // block_size] * block_size + i % block_size
        for each in sequences
        for i in range(each.num_tokens - each.num_rows)
    ]
