"""The real command, with an engine that fails or sticks once told to: argv[1] says how.

Run as a process of its own: python failing_server.py stick|break|die|none ARGUMENTS OF SERVE
"""

import sys
import threading

from minigpt4_runtime.cli import serve
from minigpt4_runtime.cli.main import run
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.engine.scheduler import Scheduler

HOW = sys.argv.pop(1)
execute, add = Runner.execute, Scheduler.add


def failing_execute(self, plan, *others):
    # The questions that a test asks are longer than the watch's own.
    if HOW == "stick" and plan.num_tokens > 60:
        threading.Event().wait()
    if HOW == "break" and (plan.num_tokens > 60 or getattr(self, "is_broken", False)):
        self.is_broken = True
        raise ValueError("the device is gone")
    if HOW == "once" and plan.num_tokens > 60 and not getattr(self, "was_broken", False):
        self.was_broken = True
        raise ValueError("a step failed")
    return execute(self, plan, *others)


def failing_add(self, sequence):
    if HOW == "die" and sequence.num_prompt > 60:
        raise ValueError("the engine's thread ends")
    add(self, sequence)


Runner.execute, Scheduler.add = failing_execute, failing_add
serve._CLOSE_SECONDS = 0.2
sys.argv[0] = "minigpt4"
run()
