"""Processes that train one model together, each from its part of every batch.

Owns   the joining of torchrun's processes, and the sum of their gradients.
Takes  how many there are; gives this one's place among them.
Never  lets what learns differ: each process has all of that, the same after each step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor

from minigpt4_runtime.devices.group import TorchGroup
from minigpt4_runtime.errors import ConfigError, MiniGPT4Error, RankLostError
from minigpt4_runtime.model.parallel import Group, Solo
from minigpt4_runtime.ranks import torchrun_rank


class Processes(Group, Protocol):
    """See `Group`. The one of rank 0 alone writes files and tells of steps."""

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers; all wait for it."""

    def use(self, collective: str) -> None:
        """Sum over that library from now on."""


class Alone(Solo):
    """One process."""

    def least(self, number: int) -> int:
        """The number itself."""
        return number

    def use(self, collective: str) -> None:
        """There is nothing to sum."""


@contextmanager
def joined(size: int | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun or a launcher like it has started, for a while.

    Without a `size`, as many as it says that there are, or this one alone.

    Raises:
        ConfigError: it has started none, or another number.
    """
    if size is None:
        said = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
        size = int(said) if said.isdecimal() else 1
    if size == 1:
        yield Alone()
        return
    rank = torchrun_rank(size, "processes")
    if rank is None:
        raise ConfigError(
            f"processes is {size}, and torchrun has not started this one. Run: torchrun "
            f"--nproc-per-node {size} -m minigpt4_runtime tune …"
        )
    group = TorchGroup(rank, size, folder=None)
    try:
        yield group
    finally:
        group.leave()


@contextmanager
def told_once(processes: Processes) -> Iterator[None]:
    """What each process finds wrong for itself, and most find alike, the first of them raises.

    The others, also those that found nothing, wait until that one is gone: a launcher ends them all
    as soon as one ends.

    Raises:
        SystemExit: another process raises.
    """
    fault = None
    try:
        yield
    except MiniGPT4Error as error:
        fault = error
    first = processes.least(processes.rank if fault else processes.size)
    if fault and first == processes.rank:
        raise fault
    if first < processes.size:
        with suppress(RankLostError):
            processes.least(0)
        raise SystemExit(1)


def sum_over(processes: Processes, tensors: Sequence[Tensor]) -> None:
    """Put the sum of all processes in the place of each tensor, in one message."""
    if processes.size == 1:
        return
    summed = processes.sum(torch.cat([each.flatten() for each in tensors]))
    parts = torch.split(summed, [each.numel() for each in tensors])
    for each, part in zip(tensors, parts, strict=True):
        each.copy_(part.view_as(each))
