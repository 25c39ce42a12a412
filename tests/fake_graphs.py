"""Stands for a device with graphs, on a CPU: what is captured is done again with the same tensors.

A function that reads a number of its step from the host would read the captured step's again, and
give other tokens.
"""

from dataclasses import replace

import torch

from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.kernels.attention_reference import ReferenceAttention
from minigpt4_runtime.kernels.registry import ATTENTION_KERNELS


class DeviceAttention(ReferenceAttention):
    """Rows that decode attend by the tensors of the step alone; a prompt as in the reference."""

    is_capturable = True

    def __call__(self, batch):
        if any(each.num_rows > 1 for each in batch.sequences):
            return super().__call__(batch)
        cache, block_size = self._cache, self._cache.shape.block_size

        def attend(layer, q, k, v):
            cache.write(layer, batch.slots, k, v)
            blocks = batch.block_table[batch.table_rows].long()
            slots = blocks[..., None] * block_size + torch.arange(block_size)
            keys, values = cache.read(layer, slots.flatten())
            is_past_end = torch.arange(slots[0].numel()) >= batch.lengths[:, None]  # (B, S)
            shape = (*is_past_end.shape, *keys.shape[1:])  # (B, S, Hkv, D)
            keys, values = (
                side.view(shape).masked_fill(is_past_end[..., None, None], 0).to(q.dtype)
                for side in (keys, values)
            )
            grouped = q.view(len(q), shape[2], -1, shape[3])
            scores = torch.einsum("bhgd,bshd->bhgs", grouped, keys).float() * shape[3] ** -0.5
            scores = scores.masked_fill(is_past_end[:, None, None], float("-inf"))
            weights = scores.softmax(-1).to(q.dtype)
            return torch.einsum("bhgs,bshd->bhgd", weights, values).reshape(q.shape)

        return attend


class Recorder:
    """Captures as the devices' contract has it, and counts."""

    def __init__(self):
        self.num_captured = 0
        self.num_replayed = 0
        self.trouble = None  # Raised in place of a capture.

    def capture(self, function):
        if self.trouble:
            raise self.trouble
        function()
        result = function().clone()
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            return result.copy_(function())

        return replay


def use_graphs(
    monkeypatch, attention="fake_graphs:DeviceAttention", *, runs_ahead=False
) -> Recorder:
    """Let the CPU capture, with a kernel that can be, and perhaps run ahead of the engine."""
    recorder = Recorder()
    facts = CpuBackend.facts
    monkeypatch.setattr(CpuBackend, "capture", staticmethod(recorder.capture))
    monkeypatch.setitem(ATTENTION_KERNELS, "device", attention)
    monkeypatch.setattr(
        CpuBackend, "facts", replace(facts, attention=("device",), runs_ahead=runs_ahead)
    )
    return recorder
