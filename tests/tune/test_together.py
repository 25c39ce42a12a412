"""Several processes train what one process would."""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from minigpt4_runtime import ConfigError
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.errors import RankLostError
from minigpt4_runtime.formats.registry import weight_format
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.frozen import divided_kernel, frozen_kernel
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.together import Alone, joined, told_once
from minigpt4_runtime.tune.tune import tune

SETTINGS = {"steps": 3, "batch_size": 4, "at_once": 2, "warmup_steps": 1, "lr": 1e-2, "lora": 2}
DIVIDED = SETTINGS | {"batch_size": 3, "at_once": 1, "recompute": True, "divide": True}


def as_options(settings):
    for name, value in settings.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)


@pytest.mark.parametrize("given", [SETTINGS, DIVIDED], ids=["whole", "divided"])
def test_two_processes_learn_what_one_does(given, dialogues, tmp_path, monkeypatch):
    """This one and the command, in the environment of torchrun; divided, they are stopped, and this
    one goes on alone with whole weights."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    data, settings = read_data(dialogues, DEMO_MODEL_DIR), TuneSettings(**given)
    undivided = TuneSettings(**given | {"divide": False})
    more = {"device": "cpu", "held_out": data, "eval_every": 2, "samples": 1}
    tune(DEMO_MODEL_DIR, data, alone, undivided, **more)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in {"RANK": "0", **shared}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "minigpt4_runtime", "tune", "--data", str(dialogues),
               "--held-out", str(dialogues), "--eval-every", "2", "--samples", "1",
               *as_options(given), "--device", "cpu", "--out", str(both)]  # fmt: skip
    second = subprocess.Popen(
        command, env={**os.environ, "RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    steps = []
    try:
        with joined() as group:
            with told_once(group):  # As the command does.
                pass
            done = tune(
                DEMO_MODEL_DIR, data, both, settings, processes=group, on_step=steps.append,
                should_stop=lambda: settings.divide and len(steps) == 2, **more,
            )  # fmt: skip
            assert second.communicate(timeout=240) == (b"", b"")
        assert second.returncode == 0
    finally:
        second.kill()
    if settings.divide:
        assert (done.steps, done.adapter) == (2, None)
        done = tune(DEMO_MODEL_DIR, data, both, undivided, resume=True, **more)
    assert (done.steps, done.adapter) == (3, both)
    for name in ("projection.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / name) for folder in (alone, both))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            # AdamW divides by a gradient's size: where that is next to nothing, rounding counts.
            assert torch.allclose(other[key], tensor, atol=1e-4), key
            assert float((other[key] - tensor).abs().mean()) < 1e-6, key
    losses = [(folder / "losses.csv").read_text("utf-8").splitlines() for folder in (alone, both)]
    numbers = [[line.split(",") for line in lines[1:]] for lines in losses]
    for one, other in zip(*numbers, strict=True):
        assert one[0] == other[0]
        assert bool(one[3]) == bool(other[3]) == (one[0] in "23")
        for mine, theirs in ((one[1], other[1]), (one[3] or 0, other[3] or 0)):
            assert float(mine) == pytest.approx(float(theirs), abs=1e-5)
    # What is said before and after is agreed on too.
    said = [(folder / "samples.json").read_text("utf-8") for folder in (alone, both)]
    assert said[0] == said[1]
    assert "null" not in said[0]


def commands(*given):
    """Two processes of the command, in the environment of torchrun: their statuses and words."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "minigpt4_runtime", "tune", *map(str, given)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [each.communicate(timeout=240) for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, out, err) for each, (out, err) in zip(started, said, strict=True)]


def test_what_is_wrong_is_told_once(dialogues, tmp_path):
    """And all end with a status that says so."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": []}\n', encoding="utf-8")
    told, silent = commands("--data", broken, "--out", tmp_path / "out")
    assert (told[:2], silent) == ((1, ""), (1, "", ""))
    assert "1 of 1 dialogues cannot be learned from" in told[2]
    # What the training itself finds, before its first step.
    told, silent = commands("--data", dialogues, "--out", tmp_path / "out", "--batch-size", 1)
    assert (told[0], silent) == (1, (1, "", ""))
    assert "batch_size is 1, and 2 processes share a batch" in told[2]


@pytest.mark.parametrize(("faulty", "teller"), [((), None), ((1,), 1), ((1, 2), 1), ((0, 2), 0)])
def test_the_first_that_finds_something_tells_it(faulty, teller):
    """The others wait for its end, also those that found nothing."""
    numbers, met, ended = {}, threading.Barrier(3), threading.Event()

    class One(Solo):
        def __init__(self, rank):
            self.rank, self.size = rank, 3

        def least(self, number):
            if number == 0 and self.rank in numbers:  # Waiting for who tells.
                ended.wait(60)
                raise RankLostError("It is gone.")
            numbers[self.rank] = number
            met.wait(60)
            return min(numbers.values())

    def run(rank):
        try:
            with told_once(One(rank)):
                if rank in faulty:
                    raise ConfigError(f"{rank} says it.")
        except ConfigError as error:
            ended.set()
            return str(error)
        except SystemExit as end:
            assert ended.is_set()
            return end.code
        return "well"

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(run, range(3)))
    silent = "well" if teller is None else 1
    assert found == [f"{rank} says it." if rank == teller else silent for rank in range(3)]


@pytest.mark.parametrize("name", ["float", "w8a16", "w4a16-g32"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_divided_weight_is_that_weight(name, size):
    """For each process, forward and back; and each holds its share of it, a little padded."""
    torch.manual_seed(0)
    chosen = weight_format(name)
    parts = chosen.pack(torch.randn(24, 64))
    rows = torch.randn(5, 64, requires_grad=True)
    wanted = frozen_kernel(chosen)(rows, parts, None)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), rows)
    shares = []

    class One(Solo):
        def __init__(self, rank):
            self.rank, self.size = rank, size

        def join(self, rows):
            return torch.cat(shares)

    divided = [divided_kernel(One(rank), chosen).arrange(parts) for rank in range(size)]
    shares += [held["held"] for held, _ in divided]
    num_bytes = sum(each.nbytes for each in parts.values())
    assert {len(each) for each in shares} == {len(shares[0])}
    assert num_bytes / size <= len(shares[0]) < num_bytes / size + 17 * len(parts)
    for held, multiply in divided:
        product = multiply(rows, held, None)
        (found,) = torch.autograd.grad(product.square().sum(), rows)
        assert torch.equal(product, wanted)
        assert torch.allclose(found, gradient, rtol=1e-5, atol=1e-5)


def test_one_process_holds_no_share(dialogues, tmp_path):
    data = read_data(dialogues, DEMO_MODEL_DIR)
    with pytest.raises(ConfigError, match="divide is given, and this process is alone"):
        tune(DEMO_MODEL_DIR, data, tmp_path, TuneSettings(divide=True), device="cpu")


def test_a_batch_too_small_to_be_shared(dialogues, tmp_path):
    class Second(Alone):
        rank, size = 1, 2

    data, settings = read_data(dialogues, DEMO_MODEL_DIR), TuneSettings(batch_size=1)
    with pytest.raises(ConfigError, match="batch_size is 1, and 2 processes share a batch"):
        tune(DEMO_MODEL_DIR, data, tmp_path, settings, device="cpu", processes=Second())


def test_processes_that_nobody_started():
    with pytest.raises(ConfigError, match=r"Run: torchrun --nproc-per-node 2"), joined(2):
        pass
