"""On what a number was measured, as far as the system tells."""

import sys
from pathlib import Path

import pytest
import torch

from minigpt4_runtime import __version__
from minigpt4_runtime.bench import ceilings, machine
from minigpt4_runtime.bench.ceilings import measure_ceilings


def test_the_facts_that_every_system_tells():
    facts = machine.machine_facts("cpu")
    assert facts["processor"]
    assert facts["cores"].endswith(f"of which torch uses {torch.get_num_threads()}")
    assert facts["versions"] == f"minigpt4-runtime {__version__}, torch {torch.__version__}"
    assert "device" not in facts


def test_an_accelerator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.machine_facts("cuda:1")["device"] == "cuda:1: GPU 1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_available_memory_is_some_of_what_there_is():
    assert 0 < machine.available_memory_bytes() <= machine._meminfo("MemTotal")
    assert machine._meminfo("MemImaginary") is None


def test_a_system_that_does_not_tell_is_taken_as_it_is(monkeypatch):
    def missing(self, *args, **settings):
        raise FileNotFoundError(2, "No such file", str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert machine.available_memory_bytes() is None
    assert "memory" not in machine.machine_facts("cpu")


def test_ceilings_count_what_was_read_and_multiplied(monkeypatch):
    seconds = iter([4.0, 2.0, 1.0])  # The sum, and the product in two dtypes.
    monkeypatch.setattr(ceilings, "_best_seconds", lambda compute, device: next(seconds))
    found = measure_ceilings("cpu", "bfloat16")
    assert found.gigabytes_per_second == 2**20 / 4.0 / 1e9
    assert found.gigaflops_per_second == 2 * 64**3 / 1.0 / 1e9
    assert measure_ceilings("cpu", "bfloat16") is found


@pytest.mark.parametrize(("device", "in_a_row"), [("cpu", 1), ("cuda", 20)])
def test_an_accelerator_computes_many_times_before_a_number_is_read(device, in_a_row):
    results = []

    def compute():
        results.append(torch.zeros(1))
        return results[-1]

    assert ceilings._best_seconds(compute, torch.device(device)) > 0
    assert len(results) == ceilings._MOST_TRIES * in_a_row
