"""Decode steps as graphs of the device: one launch in place of hundreds.

Owns   the graphs, by the number of sequences that a step is padded to and by whether any of them
       has an adapter; and which plans have one.
Takes  a plan, then the step that it was loaded as; gives logits.
Never  names a device: `capture` is the device's own. Its only state is what it has captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from minigpt4_runtime.devices.contracts import Capture, Replay
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.step_buffers import Step

# Beyond so many sequences, a graph for each number of them would take more time than it saves.
_STEP = 8

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """The graphs of one runner; each is captured when a step first needs it.

    `compute` must do the same for all steps of a size, but for what their tensors hold. Of several
    ranks, `least` gives the smallest number that one of them has: if a rank cannot capture a step,
    all do without graphs.
    """

    def __init__(
        self,
        compute: Callable[[Step], Tensor],
        capture: Capture | None,
        *,
        max_running: int,
        vocab_size: int,
        least: Callable[[int], int] = int,
    ) -> None:
        self._compute = compute
        self._capture = capture
        self._max_running = max_running
        self._vocab_size = vocab_size
        self._least = least
        self._replays: dict[tuple[int, bool], Replay] = {}

    def size_of(self, plan: StepPlan) -> int:
        """The number of sequences to pad a plan to, or 0 for a plan that is no graph's.

        All ranks find the same, though only the leader knows which ids stand for images.
        """
        if self._capture is None or not all(
            each.num_sampled == len(each.token_ids) == 1 and each.token_ids[0] < self._vocab_size
            for each in plan.slices
        ):
            return 0
        return padded_size(len(plan.slices), self._max_running)

    def logits(self, step: Step) -> Tensor:
        """(R, V) float32 logits of a step that has the size of a graph.

        They are valid until the next step: all graphs share their memory.
        """
        form = (len(step.token_ids), step.adapters is not None)
        if self._capture is not None and form not in self._replays:
            self._add(form, step)
        replay = self._replays.get(form)
        return replay() if replay else self._compute(step)

    def _add(self, form: tuple[int, bool], step: Step) -> None:
        assert self._capture is not None, "there is something to capture with"
        compute = self._compute
        try:
            self._replays[form] = self._capture(lambda: compute(step))
            why = "another rank could not be captured"
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
        if not self._least(int(form in self._replays)):
            self._capture = None
            self._replays.clear()
            logger.warning(
                "A decode step of %d sequences could not be captured as a graph (%s). The engine "
                "goes on without graphs, which is slower.", form[0], why,
            )  # fmt: skip


def padded_size(count: int, most: int) -> int:
    """How many sequences a graph has that computes `count` of them: 1, 2, 4, 8, 16, 24, …, most."""
    size = 1 << (count - 1).bit_length() if count <= _STEP else -(-count // _STEP) * _STEP
    return min(size, most)
