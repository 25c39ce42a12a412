"""The bytes of weights, read from their files piece by piece.

Owns   the memory that pieces are read into. Where a device copies by itself, a piece is on its way
       while the next one is read by several threads: neither disk nor link waits for the other.
Takes  StoredTensors; gives their pieces, and copies them.
Never  maps a file: mapped pages would count beside the new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.mapped import TORCH_DTYPES
from minigpt4_runtime.checkpoint.weights import StoredTensor
from minigpt4_runtime.errors import CheckpointError

PIECE_BYTES = 16 * 2**20
# Copies of the system's own pages take one thread a tenth of a second for each gigabyte or two.
NUM_THREADS = 4

# The start of a stretch in the file, where it goes in the buffer, and its bytes.
_Stretch = tuple[int, int, int]


class Reader:
    """Reads weights on their way to a device, through buffers that all of them share.

    Freed between them, each would leave a hole that no weight fills. At the end of its `with`, all
    that was sent is there.
    """

    def __init__(self, stored: Iterable[StoredTensor], device: torch.device) -> None:
        """For these weights: the largest one says how large the buffers are."""
        largest = max((place.num_bytes for place in stored), default=0)
        self._is_far = device.type != "cpu"
        size, count = min(PIECE_BYTES, largest), 2 if self._is_far else 1
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, pin_memory=self._is_far) for _ in range(count)
        ]
        # What waits until a buffer may be filled again.
        self._waits: list[Callable[[], object]] = [_nothing] * count
        self._next = 0
        # Without work it has no thread yet. One for each weight would take long to start.
        self._pool = ThreadPoolExecutor(NUM_THREADS)

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what was sent, and end the threads."""
        for wait in self._waits:
            wait()
        self._pool.shutdown()

    def pieces(self, stored: StoredTensor) -> Iterator[Tensor]:
        """The numbers of a weight in order. A piece is valid until the next one, or is `sent`."""
        dtype, size = TORCH_DTYPES[stored.dtype_code], len(self._buffers[0])
        for stretches in _cut(stored.runs(), size):
            self._next = (self._next + 1) % len(self._buffers)
            self._waits[self._next]()
            self._waits[self._next] = _nothing
            buffer, end = self._buffers[self._next], sum(stretches[-1][1:])
            fill = partial(_fill, stored.path, buffer.numpy().data)
            if self._is_far:
                shares = list(_shared(stretches, end))
                thread_shares = (shares[first::NUM_THREADS] for first in range(NUM_THREADS))
                list(self._pool.map(fill, thread_shares))  # A list, so that errors arrive.
            else:
                fill(stretches)
            yield buffer[:end].view(dtype)

    def send(self, piece: Tensor, target: Tensor) -> None:
        """Copy a piece to where it belongs, in the target's dtype."""
        self._waits[self._next] = self._copy(piece, target)

    def _copy(self, piece: Tensor, target: Tensor) -> Callable[[], object]:
        """Begin to copy; the result waits until the piece has been read."""
        if not self._is_far:
            target.copy_(piece)
            return _nothing
        if piece.dtype != target.dtype:  # Converted there: on the host it would be waited for.
            piece = piece.to(target.device, non_blocking=True)
        target.copy_(piece, non_blocking=True)
        stream = torch.accelerator.current_stream(target.device)
        return stream.record_event().synchronize


def _nothing() -> None:
    """There is nothing to wait for."""


def _cut(runs: Iterable[tuple[int, int]], size: int) -> Iterator[list[_Stretch]]:
    """The stretches that fill a buffer of this size, one list after the other."""
    found: list[_Stretch] = []
    filled = 0
    for start, num_bytes in runs:
        first = 0
        while first < num_bytes:
            count = min(num_bytes - first, size - filled)
            found.append((start + first, filled, count))
            first, filled = first + count, filled + count
            if filled == size:
                yield found
                found, filled = [], 0
    if found:
        yield found


def _shared(stretches: list[_Stretch], num_bytes: int) -> Iterator[_Stretch]:
    """The same, in parts that several threads read at a time."""
    most = max(1, -(-num_bytes // NUM_THREADS))
    for start, place, count in stretches:
        for first in range(0, count, most):
            yield start + first, place + first, min(most, count - first)


def _fill(path: Path, view: memoryview, stretches: Iterable[_Stretch]) -> None:
    # Unbuffered: a buffer would read beyond each row of a part.
    with path.open("rb", buffering=0) as file:
        for start, place, count in stretches:
            file.seek(start)
            while count:
                done = file.readinto(view[place : place + count])
                if not done:
                    raise CheckpointError(f"{path} was cut off while it was read.")
                place, count = place + done, count - done
