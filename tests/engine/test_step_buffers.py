"""Plans in the buffers: what the model is given, against lists laid out from the blocks alone."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.plan import UNKNOWN_ID, Slice, StepPlan
from minigpt4_runtime.engine.step_buffers import StepBuffers, send_blocks

CONTEXT, MOST_ROWS, SCRATCH = 24, 4, 91


def make_buffers(config, max_context, device="cpu"):
    return StepBuffers(
        config, max_context=max_context, scratch_block=SCRATCH, device=torch.device(device)
    )


class Told:
    """Sequences that grow at random, and the plans that tell of them; a row may change hands."""

    def __init__(self, draw, block_size):
        self._draw = draw
        self._block_size = block_size
        self.blocks = {}  # Row of the table → blocks.
        self.num_tokens = {}

    def plan(self):
        slices = []
        for row in self._draw(st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, unique=True)):
            before = self.num_tokens.get(row, 0)
            if before == CONTEXT or self._draw(st.integers(0, 4)) == 0:
                self.blocks[row], before = [], 0  # Another sequence has it now.
            blocks = self.blocks.setdefault(row, [])
            count = self._draw(st.integers(1, min(6, CONTEXT - before)))
            first = len(blocks)
            if blocks and self._draw(st.integers(0, 4)) == 0:
                first = len(blocks) - 1  # A block that others read was copied.
            while len(blocks) * self._block_size < before + count or first == len(blocks) - 1:
                is_near = self._draw(st.booleans()) and blocks
                block = blocks[-1] + 1 if is_near else self._draw(st.integers(0, 90))
                if first == len(blocks) - 1 and len(blocks) * self._block_size >= before + count:
                    blocks[-1] = block
                    break
                blocks.append(block)
            self.num_tokens[row] = before + count
            ids = tuple(self._draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
            sampled = self._draw(st.integers(0, count))
            slices.append(
                Slice(
                    7, 0, before, ids, row, first, tuple(blocks[first:]), num_sampled=sampled,
                    adapter=self._draw(st.integers(0, 2)),
                )
            )  # fmt: skip
        return StepPlan(tuple(slices))


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from([1, 4, 16]))
def test_a_step_is_what_its_plans_told(data, block_size):
    config = EngineConfig(max_running=MOST_ROWS, max_step_tokens=64, block_size=block_size)
    buffers = make_buffers(config, CONTEXT, "cpu")
    told = Told(data.draw, block_size)
    for _ in range(data.draw(st.integers(1, 6))):
        plan = told.plan()
        step = buffers.load(StepPlan.decode(plan.encode()))
        row, positions, slots, sampled = 0, [], [], []
        for each, sequence in zip(plan.slices, step.batch.sequences, strict=True):
            blocks = told.blocks[each.table_row]
            stop = each.start + len(each.token_ids)
            positions += range(each.start, stop)
            slots += [
                blocks[i // block_size] * block_size + i % block_size
                for i in range(each.start, stop)
            ]
            assert sequence[:4] == (row, len(each.token_ids), stop, each.table_row)
            row += len(each.token_ids)
            sampled += range(row - each.num_sampled, row)
            held = step.batch.blocks_of(sequence, block_size).tolist()
            assert held == blocks[: len(held)]
            if sequence.run_start is not None:
                assert held == list(range(sequence.run_start, sequence.run_start + len(held)))
        assert step.token_ids.tolist() == [i for each in plan.slices for i in each.token_ids]
        assert step.positions.tolist() == positions
        chosen = [each.adapter for each in plan.slices for _ in each.token_ids]
        assert (None if step.adapters is None else step.adapters.tolist()) == (
            chosen if any(chosen) else None
        )
        assert step.batch.slots.tolist() == slots
        assert step.sampled_rows.tolist() == sampled
        assert step.batch.lengths.tolist() == [each[2] for each in step.batch.sequences]
        assert step.batch.table_rows.tolist() == [each[3] for each in step.batch.sequences]


def test_a_sequence_that_grows_in_one_run_is_known_as_one():
    config = EngineConfig(max_running=1, block_size=2)
    buffers = make_buffers(config, 8, "cpu")
    starts = []
    for position, new in enumerate([(5,), (), (6,), (), (7,), (), (3,), ()]):
        first = (position + 1) // 2
        step = buffers.load(StepPlan((Slice(0, 0, position, (1,), 0, first, new),)))
        starts.append(step.batch.sequences[0].run_start)
    assert starts == [5, 5, 5, 5, 5, 5, None, None]


def test_the_buffers_stay_where_they_are():
    config = EngineConfig(max_running=2, max_step_tokens=8, block_size=4)
    buffers = make_buffers(config, 32, "cpu")
    places = set()
    for count in (3, 1, 8):
        slices = (Slice(0, 0, 0, (1,) * count, 0, 0, (0, 1), num_sampled=1),)
        step = buffers.load(StepPlan(slices))
        tensors = (
            step.token_ids, step.positions, step.sampled_rows, step.batch.slots,
            step.batch.lengths, step.batch.table_rows, step.batch.block_table,
        )  # fmt: skip
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(places) == 1


def test_unknown_ids_are_the_choices_of_the_last_step():
    buffers = make_buffers(EngineConfig(max_running=4, block_size=4), 16)
    slices = (
        Slice(0, 0, 3, (UNKNOWN_ID,), 0, 0, (0,), choice=2),
        Slice(1, 0, 0, (5, 6), 1, 0, (1,)),
        Slice(2, 0, 3, (UNKNOWN_ID,), 2, 0, (2,), choice=0),
    )
    step = buffers.load(StepPlan(slices), choices=torch.tensor([70, 80, 90]))
    assert step.token_ids.tolist() == [90, 5, 6, 70]
    ids = buffers.load(StepPlan(slices[1:2]), num_sequences=2, choices=torch.tensor([])).token_ids
    assert ids.tolist() == [5, 6, 0]


def test_all_new_blocks_of_a_step_are_sent_at_once():
    table = torch.full((3, 4), -1, dtype=torch.int32)
    send_blocks(
        StepPlan((Slice(0, 0, 0, (1,), 2, 1, (7, 8)), Slice(1, 0, 0, (1,), 0, 0, ()))), table
    )
    send_blocks(
        StepPlan((Slice(1, 0, 0, (1,), 0, 0, (5,)), Slice(0, 0, 0, (1,), 2, 2, (9,)))), table
    )
    assert table.tolist() == [[5, -1, -1, -1], [-1] * 4, [-1, 7, 9, -1]]


@pytest.mark.gpu
def test_a_gpu_is_given_the_same():
    config = EngineConfig(max_running=4, max_step_tokens=32, block_size=4)
    here, there = (make_buffers(config, 32, name) for name in ("cpu", "cuda"))
    random = numpy.random.default_rng(0)
    for start in range(0, 30, 3):
        new = {row: tuple(random.integers(0, 99, 8).tolist()) for row in (2, 0, 3)}
        plan = StepPlan(
            tuple(
                Slice(0, 0, start, (row, 5), row, 0, blocks, num_sampled=int(row > 0))
                for row, blocks in new.items()
            )
        )
        ours, theirs = here.load(plan), there.load(plan)
        for name in ("token_ids", "positions", "sampled_rows"):
            assert getattr(theirs, name).tolist() == getattr(ours, name).tolist()
        for name in ("slots", "lengths", "table_rows", "block_table"):
            assert getattr(theirs.batch, name).tolist() == getattr(ours.batch, name).tolist()


@given(st.data())
def test_a_plan_is_sent_whole(data):
    plan = Told(data.draw, 4).plan()
    sent = StepPlan.decode(plan.encode())
    assert [(each.token_ids, each.new_blocks) for each in sent.slices] == [
        (each.token_ids, each.new_blocks) for each in plan.slices
    ]
    for field in ("num_sampled", "adapter", "choice"):
        assert [getattr(each, field) for each in sent.slices] == [
            getattr(each, field) for each in plan.slices
        ]
    assert not plan.has_unknown_ids


def test_what_is_not_known_yet_is_sent_as_such():
    plan = StepPlan(
        (Slice(-1, 0, 3, (UNKNOWN_ID,), 0, 0, (4,), choice=0), Slice(-1, 0, 0, (5,), 1, 0, ()))
    )
    assert StepPlan.decode(plan.encode()) == plan
    assert plan.has_unknown_ids


def test_a_message_does_not_grow_with_the_context():
    def size(start):
        return len(StepPlan((Slice(1, 0, start, (5,), 3, start // 16, ()),), ((1, 2),)).encode())

    assert size(4000) == size(100) < 64
