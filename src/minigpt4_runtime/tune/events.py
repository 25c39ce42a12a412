"""A training's numbers for TensorBoard, where it is installed.

Owns   the event files in the training's folder.
Takes  steps that are done. Without the package nothing happens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4_runtime.tune.tune import Step


class Events:
    """`add` after each step, and `flush` where its numbers must be on the disk."""

    def __init__(self, out_dir: Path, steps_done: int) -> None:
        """Go on behind so many steps: what an earlier run wrote beyond them is withdrawn."""
        self._writer = _open(out_dir, steps_done)

    def add(self, step: Step) -> None:
        """The loss, the rate, and the held-out loss where it was measured."""
        if self._writer is None:
            return
        numbers = {"loss/training": step.loss, "loss/held out": step.held_out, "rate": step.rate}
        for name, value in numbers.items():
            if value is not None:
                self._writer.add_scalar(name, value, step.number)

    def flush(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.flush()


def _open(out_dir: Path, steps_done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out_dir), purge_step=steps_done + 1 if steps_done else None)
