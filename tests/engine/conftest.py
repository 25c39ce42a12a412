"""Engines on a fake executor."""

import pytest
from fake_executor import BLOCK_SIZE, BOS
from fake_runner import (
    END,
)

from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.engine import Engine


@pytest.fixture(params=["in turn", "ahead"])
def start(request):
    """Makes engines; closes them, and checks that none of their blocks is lost.

    They read a step's ids before the next step, or a step later.
    """
    started = []

    def start_engine(executor, *, num_blocks=100, max_context=400, **config):
        engine = Engine(
            executor,
            EngineConfig(block_size=BLOCK_SIZE, **config),
            num_blocks=num_blocks,
            max_context=max_context,
            bos_id=BOS,
            eos_id=END,
            runs_ahead=request.param == "ahead",
        )
        started.append((executor, engine))
        return engine

    yield start_engine
    for executor, engine in started:
        executor.let_run()
        engine.close()
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
        assert not engine._inboxes
