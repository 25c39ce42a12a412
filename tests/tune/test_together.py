"""Several processes train what one process would."""

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


def test_two_processes_learn_what_one_does(dialogues, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    data = read_data(dialogues, DEMO_MODEL_DIR)
    tune(DEMO_MODEL_DIR, data, alone, TuneSettings(**SETTINGS), device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "-m", "minigpt4_runtime", "tune", "--data", str(dialogues), *GIVEN,
               "--device", "cpu", "--processes", "2", "--out", str(both)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{both}\n"
    assert done.stderr.count("step 3 of 3: loss ") == 1
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
