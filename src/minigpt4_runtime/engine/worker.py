"""One step on all ranks: the leader says what to compute, and all compute it.

Owns   the messages between the ranks' runners.
Takes  a runner and the group it is in.
Never  decides: the plan comes from the scheduler, which only the leader has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.devices.contracts import ParallelGroup
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.runner import EncodeCount, Runner
from minigpt4_runtime.errors import RankLostError

# The beginning of a message that is not a plan.
_ENGINE = b"engine "


@dataclass(frozen=True)
class Leader:
    """The runner of rank 0: sends each plan to the other ranks before it executes it.

    `explain` may know better why a rank was lost.
    """

    runner: Runner
    group: ParallelGroup
    explain: Callable[[RankLostError], RankLostError]

    @property
    def encoded(self) -> EncodeCount:
        """See `Executor`."""
        return self.runner.encoded

    def execute(
        self, plan: StepPlan, pixels: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> Tensor:
        """See `Runner.execute`. The plan is sent once, without images: only this rank has them.

        Where it goes on from `choices`, they follow: only this rank has chosen.

        Raises:
            RankLostError: another rank is gone, or does not answer.
        """
        try:
            self.group.send(plan.encode())
            if plan.has_unknown_ids:
                assert choices is not None, "a plan with unknown ids comes with the last choices"
                choices = self.group.spread(choices)
            return self.runner.execute(plan, pixels, choices)
        except RankLostError as error:
            raise self.explain(error) from error


def renew(group: ParallelGroup, engine: EngineConfig) -> None:
    """Let all followers go on with another engine's runner. For the leader."""
    group.send(_ENGINE + json.dumps(asdict(engine)).encode("ascii"))


def follow(
    make_runner: Callable[[EngineConfig], Runner], engine: EngineConfig, group: ParallelGroup
) -> None:
    """Execute the leader's plans, and take over another engine's settings, until it ends."""
    runner, num_chosen = make_runner(engine), 0
    while message := group.receive():
        if message.startswith(_ENGINE):
            del runner  # Its cache must be gone before the next one is made.
            runner = make_runner(EngineConfig(**json.loads(message.removeprefix(_ENGINE))))
        else:
            plan, choices = StepPlan.decode(message), None
            if plan.has_unknown_ids:  # From the rows of the last logits, one from each.
                choices = group.spread(runner.room_for_choices(num_chosen))
            num_chosen = len(runner.execute(plan, {}, choices))
