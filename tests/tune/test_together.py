"""Several processes train what one process would."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from minigpt4_runtime import ConfigError
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.together import Alone, joined
from minigpt4_runtime.tune.tune import tune

SETTINGS = {"steps": 3, "batch_size": 4, "at_once": 2, "warmup_steps": 1, "lr": 1e-2, "lora": 2}
GIVEN = [
    str(each) for name, value in SETTINGS.items() for each in (f"--{name.replace('_', '-')}", value)
]


def test_two_processes_learn_what_one_does(dialogues, tmp_path, monkeypatch):
    """This one and the command, in the environment that torchrun makes."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    data, settings = read_data(dialogues, DEMO_MODEL_DIR), TuneSettings(**SETTINGS)
    tune(DEMO_MODEL_DIR, data, alone, settings, device="cpu")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in {"RANK": "0", **shared}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "minigpt4_runtime", "tune", "--data", str(dialogues), *GIVEN,
               "--device", "cpu", "--processes", "2", "--out", str(both)]  # fmt: skip
    second = subprocess.Popen(
        command, env={**os.environ, "RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with joined(2) as group:
            done = tune(DEMO_MODEL_DIR, data, both, settings, device="cpu", processes=group)
            assert (done.steps, done.adapter) == (3, both)
            assert second.communicate(timeout=240) == (b"", b"")
        assert second.returncode == 0
    finally:
        second.kill()
    for name in ("projection.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / name) for folder in (alone, both))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            # AdamW divides by a gradient's size: where that is next to nothing, rounding counts.
            assert torch.allclose(other[key], tensor, atol=1e-4), key
            assert float((other[key] - tensor).abs().mean()) < 1e-6, key
    losses = [(folder / "losses.csv").read_text("utf-8").splitlines() for folder in (alone, both)]
    for one, other in zip(*losses, strict=True):
        assert one.split(",")[0] == other.split(",")[0]
    shown = [[float(line.split(",")[1]) for line in lines[1:]] for lines in losses]
    assert shown[0] == pytest.approx(shown[1], abs=1e-5)


def test_a_batch_too_small_to_be_shared(dialogues, tmp_path):
    class Second(Alone):
        rank, size = 1, 2

    data, settings = read_data(dialogues, DEMO_MODEL_DIR), TuneSettings(batch_size=1)
    with pytest.raises(ConfigError, match="batch_size is 1, and 2 processes share a batch"):
        tune(DEMO_MODEL_DIR, data, tmp_path, settings, device="cpu", processes=Second())


def test_processes_that_nobody_started():
    with pytest.raises(ConfigError, match=r"Run: torchrun --nproc-per-node 2"), joined(2):
        pass
