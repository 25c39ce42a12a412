"""The demo model's training runs from nothing to a folder that loads, the same way each time."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from minigpt4_runtime import MiniGPT4

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def train_demo(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import train_demo

    plans = {
        stage: train_demo.Plan(steps=1, batch=2, rate=1e-3, turns=plan.turns)
        for stage, plan in train_demo.PLANS.items()
    }
    monkeypatch.setattr(train_demo, "PLANS", plans)
    monkeypatch.setattr(train_demo, "FITTED_BATCHES", 1)
    monkeypatch.setattr("demo_lessons.TOKENIZER_SCENES", 200)
    # Most of a step's time on a CPU is Muon's iteration.
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))
    return train_demo


def run(train_demo, monkeypatch, work_dir, *arguments):
    out = work_dir / "model"
    command = ["train_demo.py", "--work-dir", str(work_dir), "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    train_demo.main()
    return out


def test_all_stages_make_the_same_model_each_time(train_demo, monkeypatch, tmp_path):
    models = [
        MiniGPT4.load(run(train_demo, monkeypatch, tmp_path / name), device="cpu")
        for name in ("first", "second")
    ]
    pictures = sorted((SCRIPTS.parent / "examples" / "images").glob("*.png"))
    first, second = (model.embed_images(pictures) for model in models)
    assert torch.equal(first, second)
    assert models[0].config == models[1].config


def test_a_stage_wants_the_ones_before_it(train_demo, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="Run --stage look first"):
        run(train_demo, monkeypatch, tmp_path, "--stage", "join")
