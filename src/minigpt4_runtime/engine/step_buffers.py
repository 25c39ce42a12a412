"""The inputs of a step, in tensors at fixed addresses.

Owns   the token ids, positions and slots of a step's rows, and the block table of all sequences.
Takes  a StepPlan, which has the new entries of the block table; gives a Step, padded with rows
       that live in a scratch block of the cache.
Never  grows: each tensor has room for the largest step, at an address that a captured graph keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.plan import UNKNOWN_ID, Slice, StepPlan
from minigpt4_runtime.kernels.contracts import SequenceRows, StepBatch


@dataclass(frozen=True)
class Step:
    """One step as the model takes it: T rows of B sequences, of which S are sampled."""

    token_ids: Tensor  # (T,)
    positions: Tensor  # (T,): each row's place in its sequence.
    sampled_rows: Tensor  # (S,): the rows whose logits are wanted.
    batch: StepBatch
    adapters: Tensor | None = None  # (T,): the number of each row's adapter; None if all have none.


class StepBuffers:
    """The memory of all steps of an engine. A step is valid until the next one is loaded.

    `scratch_block` is a block of the cache that no sequence has.
    """

    def __init__(
        self, config: EngineConfig, *, max_context: int, scratch_block: int, device: torch.device
    ) -> None:
        self._block_size = config.block_size
        # The last row belongs to padding: sequences of a single token, whose result nothing reads.
        size = (config.max_running + 1, -(-max_context // config.block_size))
        self._host_table = numpy.zeros(size, numpy.int32)
        self._host_table[-1, 0] = scratch_block
        self._padding = Slice(-1, 0, 0, (0,), config.max_running, 0, (), num_sampled=1)
        self._table = _on_device(self._host_table, device)
        # Ids, positions, lengths, table rows, sampled rows, slots: see `Step` and `StepBatch`; and
        # the row of the last step's choices that has an id, or -1 where the plan has it; adapters.
        self._host = numpy.zeros((8, config.max_step_tokens), numpy.int64)
        self._device = _on_device(self._host, device)
        self._rows = self._device.unbind()
        # The first block of each row whose blocks lie one behind the other, else None.
        self._run_starts: list[int | None] = [*[None] * config.max_running, scratch_block]

    def load(
        self, plan: StepPlan, *, num_sequences: int = 0, choices: Tensor | None = None
    ) -> Step:
        """Put a plan into the buffers: one copy to the device, and the new entries of the table.

        A step of fewer than `num_sequences` is padded to so many. `choices` are the last step's,
        which the device puts in the place of unknown ids: the host does not wait for them.
        """
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[SequenceRows] = []
        sampled: list[int] = []
        padding = [self._padding] * (num_sequences - len(plan.slices))
        self._note_blocks(plan)
        for each in (*plan.slices, *padding):
            first_row, stop = len(ids), each.start + len(each.token_ids)
            ids += each.token_ids
            positions += range(each.start, stop)
            run_start = self._run_starts[each.table_row]
            sequences.append(
                SequenceRows(first_row, len(ids) - first_row, stop, each.table_row, run_start)
            )
            sampled += range(len(ids) - each.num_sampled, len(ids))
        lengths = [each.num_tokens for each in sequences]
        table_rows = [each.table_row for each in sequences]
        for row, values in zip(
            self._host, (ids, positions, lengths, table_rows, sampled), strict=False
        ):
            row[: len(values)] = values
        self._find_slots(sequences, len(ids))
        self._host[6, : len(ids)] = -1
        for each, rows in zip(plan.slices, sequences, strict=False):
            if each.choice is not None:
                self._host[6, rows.first_row] = each.choice
        has_adapters = any(each.adapter for each in plan.slices)
        if has_adapters:
            self._host[7, : len(ids)] = 0
            for each, rows in zip(plan.slices, sequences, strict=False):
                self._host[7, rows.first_row : rows.first_row + rows.num_rows] = each.adapter
        step = self._step(tuple(sequences), len(ids), len(sampled), has_adapters=has_adapters)
        if UNKNOWN_ID in ids:
            assert choices is not None, "a plan with unknown ids comes with the last choices"
            chosen_from = self._rows[6][: len(ids)]
            chosen = choices.index_select(0, chosen_from.clamp(min=0))
            step.token_ids.copy_(torch.where(chosen_from < 0, step.token_ids, chosen))
        return step

    def _step(
        self,
        sequences: tuple[SequenceRows, ...],
        num_rows: int,
        num_sampled: int,
        *,
        has_adapters: bool,
    ) -> Step:
        if self._device.device.type != "cpu":
            # From pinned memory, or the host would wait until the step before has ended.
            self._device.copy_(torch.from_numpy(self._host).pin_memory(), non_blocking=True)
        ids, positions, lengths, table_rows, sampled, slots, _, adapters = self._rows
        batch = StepBatch(
            sequences, slots[:num_rows], lengths[: len(sequences)], table_rows[: len(sequences)],
            self._table,
        )  # fmt: skip
        return Step(
            ids[:num_rows], positions[:num_rows], sampled[:num_sampled], batch,
            adapters[:num_rows] if has_adapters else None,
        )  # fmt: skip

    def _note_blocks(self, plan: StepPlan) -> None:
        """Write new blocks into the table, and see whether those of a row still lie in one run."""
        for each in plan.slices:
            row, first, blocks = each.table_row, each.first_block, each.new_blocks
            if not blocks:
                continue
            here = slice(first, first + len(blocks))
            self._host_table[row, here] = blocks
            start = self._run_starts[row] if first else blocks[0]
            is_run = start is not None and blocks == tuple(range(start + first, start + here.stop))
            self._run_starts[row] = start if is_run else None
        if self._table.device.type != "cpu":
            send_blocks(plan, self._table)

    def _find_slots(self, sequences: list[SequenceRows], num_rows: int) -> None:
        """Where each row's key and value go."""
        size, positions = self._block_size, self._host[1, :num_rows]
        table_rows = self._host[3, : len(sequences)]
        if num_rows > len(sequences):
            table_rows = table_rows.repeat([each.num_rows for each in sequences])
        blocks = self._host_table[table_rows, positions // size]
        self._host[5, :num_rows] = blocks * size + positions % size


def send_blocks(plan: StepPlan, table: Tensor) -> None:
    """Write the new blocks of a plan into a table on another device, in one copy."""
    places: list[int] = []
    blocks: list[int] = []
    for each in plan.slices:
        first = each.table_row * table.shape[1] + each.first_block
        places += range(first, first + len(each.new_blocks))
        blocks += each.new_blocks
    if blocks:
        new = send(torch.tensor((places, blocks)), table.device)
        table.view(-1).index_copy_(0, new[0], new[1].to(table.dtype))


def _on_device(host: NDArray[Any], device: torch.device) -> Tensor:
    """The same memory on a CPU, else a copy."""
    return torch.from_numpy(host).to(device)
