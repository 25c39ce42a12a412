"""One step on all ranks: the leader says what to compute, and all compute it.

Owns   what is said between the ranks' runners.
Takes  a runner and the group it is in.
Never  decides: the plan comes from the scheduler, which only the leader has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

from torch import Tensor

from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.devices.contracts import ParallelGroup
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.errors import RankLostError

# What a message begins with that is no plan.
_ENGINE = b"engine "


class Leader:
    """The runner of rank 0, whose every step is also everybody else's.

    `explain` may know better why a rank was lost.
    """

    def __init__(
        self,
        runner: Runner,
        group: ParallelGroup,
        explain: Callable[[RankLostError], RankLostError],
    ) -> None:
        self._runner = runner
        self._group = group
        self._explain = explain

    @property
    def num_encoded_images(self) -> int:
        """See `Executor`."""
        return self._runner.num_encoded_images

    @property
    def encode_seconds(self) -> float:
        """See `Executor`."""
        return self._runner.encode_seconds

    def execute(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> Tensor:
        """See `Runner.execute`. The plan is sent once, without pictures: those are rows here.

        Raises:
            RankLostError: another rank is gone, or does not answer.
        """
        try:
            self._group.send(plan.encode())
            return self._runner.execute(plan, pixels)
        except RankLostError as error:
            raise self._explain(error) from error


def renew(group: ParallelGroup, engine: EngineConfig) -> None:
    """Let all followers go on with another engine's runner. For the leader."""
    group.send(_ENGINE + json.dumps(asdict(engine)).encode("ascii"))


def follow(
    make_runner: Callable[[EngineConfig], Runner], engine: EngineConfig, group: ParallelGroup
) -> None:
    """Do as the leader says, until it says no more: a step, or another engine's settings."""
    runner = make_runner(engine)
    while message := group.receive():
        if message.startswith(_ENGINE):
            del runner  # Its cache must be gone before the next one is made.
            runner = make_runner(EngineConfig(**json.loads(message.removeprefix(_ENGINE))))
        else:
            runner.execute(StepPlan.decode(message), {})
