"""The engine's thread: when it works, rests and ends."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_executor import (
    BOS,
    ENDLESS,
    PATIENCE,
    Executor,
    PacedExecutor,
    events_of,
    ids_of,
    request_of,
    submit,
    submit_together,
    wait_until_idle,
)
from fake_runner import (
    END,
)

from minigpt4_runtime import RequestError
from minigpt4_runtime.engine import engine as engine_module
from minigpt4_runtime.errors import MiniGPT4Error


def test_closing_ends_all_with_an_error_and_refuses_what_comes_later(start):
    executor = PacedExecutor()
    engine = start(executor, max_running=1)
    requests = [request_of(BOS, number, **ENDLESS) for number in (3, 4)]
    running, waiting = submit_together(engine, executor, requests)
    executor.go_on()
    executor.next_plan()
    arrived = submit(engine, BOS, 5, **ENDLESS)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._end:
        time.sleep(0)
    executor.let_run()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not engine._thread.is_alive()
    assert next(running).token_id == 4
    for ticket in (running, waiting, arrived):
        with pytest.raises(RequestError, match="was closed"):
            events_of(ticket)
    with pytest.raises(RequestError, match="was closed"):
        submit(engine, BOS, 3)


def test_a_mistake_between_steps_leaves_nobody_waiting(start, monkeypatch):
    engine = start(Executor())

    def fail(_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(engine._scheduler, "add", fail)
    for _ in range(2):
        with pytest.raises(MiniGPT4Error, match=r"The engine failed \(ZeroDivisionError"):
            events_of(submit(engine, BOS, 3))
    assert not engine._is_working


def test_what_never_worked_can_be_closed(start):
    engine = start(Executor())
    engine.close()
    with pytest.raises(RequestError, match="was closed"):
        submit(engine, BOS, 3)


def test_the_thread_ends_when_idle_and_a_later_request_starts_another(start):
    engine = start(Executor())
    threads = []
    for _ in range(2):
        assert ids_of(submit(engine, BOS, 9)) == [10, 0, 1, END]
        threads.append(engine._thread)
        wait_until_idle(engine)
    assert threads[0] is not threads[1]


def test_a_thread_that_lingers_is_woken_by_a_request_and_by_closing(start, monkeypatch):
    monkeypatch.setattr(engine_module, "_LINGER_SECONDS", 2 * PATIENCE)
    engine = start(Executor())
    threads = set()
    for _ in range(3):
        assert ids_of(submit(engine, BOS, 9)) == [10, 0, 1, END]
        threads.add(engine._thread)
    assert len(threads) == 1
    engine.close()


def test_no_request_is_lost_while_the_thread_ends(start, monkeypatch):
    monkeypatch.setattr(engine_module, "_LINGER_SECONDS", 0)
    engine = start(Executor())

    def ask_often(_):
        return [ids_of(submit(engine, BOS, 10, max_new_tokens=1)) for _ in range(100)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask_often, range(2))) == [[[0]] * 100] * 2


PROGRAM = """
import threading
import torch
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.runner import EncodeCount

class Executor:
    encoded = EncodeCount()
    def execute(self, plan, pixels, choices=None):
        return torch.zeros(sum(piece.num_sampled for piece in plan.slices), 5)

def submit(max_new_tokens):
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return engine.submit(Request((1, 3), (), sampling), lambda event: event)

config = EngineConfig(block_size=10**4, prefix_cache=False)
limits = {"num_blocks": 10**4, "max_context": 10**8}
engine = Engine(Executor(), config, **limits, bos_id=1, eos_id=2)
endless = submit(10**8)
"""
AT_ONCE = """
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(next(endless).token_id)
"""
WITH_A_READER_LEFT = """
def read():
    threading.main_thread().join()
    print(len(list(submit(50))))

threading.Thread(target=read).start()
"""


@pytest.mark.parametrize(
    ("ending", "output"),
    [
        pytest.param(AT_ONCE, "0", id="at once"),
        pytest.param(WITH_A_READER_LEFT, "50", id="with a reader left"),
    ],
)
def test_a_program_ends_though_an_answer_goes_on(ending, output):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending],
        capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (finished.stdout.strip(), finished.stderr, finished.returncode) == (output, "", 0)
