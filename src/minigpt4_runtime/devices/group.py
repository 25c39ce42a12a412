"""Ranks that share a model, over torch.distributed.

Owns   this process's place in the group, and the recognition of a lost rank.
Takes  a rank, a size and the folder where the ranks meet; rows and messages to pass.
Never  starts or ends a process, and never waits on a GPU.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from minigpt4_runtime.devices.contracts import Traffic
from minigpt4_runtime.errors import ConfigError, RankLostError

# Messages of up to this size, which most are, take one broadcast.
_FRAME_BYTES = 4096
_LENGTH_BYTES = 4
_FOREVER = timedelta(days=365)
# On a GPU only the library itself can tell that a rank hangs, and it then ends the process. So this
# must be longer than a leader's work between the sums of two steps, such as encoding images.
_DEVICE_TIMEOUT = timedelta(minutes=10)
_LOST = "A rank of this model is gone, or does not answer ({}). Load the model again."


class TorchGroup:
    """One process's view of a group. Messages go over gloo, rows over the devices' library.

    Only one can be joined at a time: torch has a single world in each process.
    """

    def __init__(self, rank: int, size: int, *, folder: Path | None) -> None:
        """Join, and wait until all have joined.

        They meet in a file in `folder`, so that no port is opened. None: they meet as torchrun's
        environment says.
        """
        if dist.is_initialized():
            raise ConfigError(
                "This process is in a group of torch.distributed already. Close the other model "
                "that is divided, or run this one in a process of its own."
            )
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        # Followers wait without a limit: the leader may be idle for days.
        self._patience: timedelta | None = None
        store = None
        if folder:
            store = dist.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_FOREVER)
        self._rows = dist.group.WORLD

    def use(self, collective: str) -> None:
        """Pass rows over that library from now on. All ranks must choose the same."""
        if collective != "gloo":
            self._rows = dist.new_group(backend=collective, timeout=_DEVICE_TIMEOUT)

    def set_patience(self, seconds: float) -> None:
        """Consider a rank lost after this time. For the leader, once all have loaded."""
        self._patience = timedelta(seconds=seconds)

    def leave(self) -> None:
        """Free this process for another group."""
        dist.destroy_process_group()

    def sum(self, rows: Tensor) -> Tensor:
        """See `Group`."""
        rows = rows.contiguous()
        self._wait(rows, dist.all_reduce(rows, group=self._rows, async_op=True))
        return rows

    def join(self, rows: Tensor) -> Tensor:
        """See `Group`."""
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        self._wait(rows, dist.all_gather(parts, rows, group=self._rows, async_op=True))
        return torch.cat(parts, dim=-1)

    def spread(self, numbers: Tensor) -> Tensor:
        """See `ParallelGroup`."""
        self._wait(numbers, dist.broadcast(numbers, src=0, group=self._rows, async_op=True))
        return numbers

    def least(self, number: int) -> int:
        """See `ParallelGroup`."""
        found = torch.tensor(number)
        self._wait(found, dist.all_reduce(found, dist.ReduceOp.MIN, async_op=True))
        return int(found)

    def send(self, message: bytes) -> None:
        """See `ParallelGroup`."""
        frame = len(message).to_bytes(_LENGTH_BYTES, "little") + message
        frame += bytes(max(0, _FRAME_BYTES - len(frame)))
        for part in (frame[:_FRAME_BYTES], frame[_FRAME_BYTES:]):
            if part:
                self._broadcast(bytearray(part))

    def receive(self) -> bytes:
        """See `ParallelGroup`."""
        frame = self._broadcast(bytearray(_FRAME_BYTES))
        length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
        if length + _LENGTH_BYTES > _FRAME_BYTES:
            frame += self._broadcast(bytearray(length + _LENGTH_BYTES - _FRAME_BYTES))
        return bytes(frame[_LENGTH_BYTES : _LENGTH_BYTES + length])

    def _broadcast(self, message: bytearray) -> bytearray:
        words = torch.frombuffer(message, dtype=torch.uint8)
        self._wait(words, dist.broadcast(words, src=0, async_op=True))
        return message

    def _wait(self, given: Tensor, work: dist.Work | None) -> None:
        """Wait for a collective of this rank's `given`, and count it."""
        assert work is not None, "this rank is in the group"
        started = time.perf_counter()
        try:
            # With a limit, waiting for a GPU's library would block this process at every sum.
            if self._patience and given.device.type == "cpu":
                work.wait(self._patience)
            else:
                work.wait()
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error
        before = self.traffic
        self.traffic = Traffic(
            before.num_calls + 1,
            before.num_bytes + given.nbytes,
            before.seconds + time.perf_counter() - started,
        )
