"""The page of a training, the answers on it, and events for TensorBoard."""

import json
import sys
from types import ModuleType

import pytest
import torch
from test_tune import run

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.features import picture_features
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.page import write_page
from minigpt4_runtime.tune.samples import SAMPLES_NAME, Sample, Samples, read_samples
from minigpt4_runtime.tune.settings import TuneSettings


@pytest.fixture(scope="module")
def writer():
    """What a TensorBoard writer was told: tensorboard itself need not be installed."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            told.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def flush(self):
            told.append(("flush",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter, module.told = SummaryWriter, told
    return module


@pytest.fixture(scope="module")
def trained(dialogues, tmp_path_factory, writer):
    """A training that was stopped in the middle, and its folder; then the rest of it."""
    out_dir = tmp_path_factory.mktemp("trained")
    held_out = read_data(dialogues, DEMO_MODEL_DIR)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", writer)
        more = {"held_out": held_out, "eval_every": 5, "samples": 3, "on_step": steps.append}
        run(dialogues, out_dir, should_stop=lambda: len(steps) == 7, **more)
        stopped = write_page(out_dir, {"steps done": 7}).read_text("utf-8")
        before = read_samples(out_dir / SAMPLES_NAME)
        run(dialogues, out_dir, resume=True, **more)
    return out_dir, steps, stopped, before


def test_the_page_of_a_stopped_training_and_of_a_whole_one(trained):
    out_dir, steps, stopped, before = trained
    assert len(before) == 3
    assert all(each.before is not None and each.after is None for each in before)
    assert (stopped.count("<dt>Before</dt>"), stopped.count("<dt>After</dt>")) == (3, 0)
    after = read_samples(out_dir / SAMPLES_NAME)
    assert [each.before for each in after] == [each.before for each in before]
    assert all(each.after is not None for each in after)
    page = write_page(out_dir, {"model": "<demo>"}).read_text("utf-8")
    assert "&lt;demo&gt;" in page
    assert page.count("<picture>") == 2  # The losses, and the rate.
    assert page.count("<dt>After</dt>") == page.count('class="best">Right would be') == 3
    last = next(step for step in reversed(steps) if step.held_out is not None)
    assert f">{last.held_out:.4f}</td>" in page
    # A folder without a step, or with a damaged file, still has a page.
    (out_dir / SAMPLES_NAME).write_text("{", "utf-8")
    assert "Before" not in write_page(out_dir, {}).read_text("utf-8")


def test_tensorboard_is_told_each_step_once(trained, writer):
    out_dir, steps, *_ = trained
    opened = [each for each in writer.told if each[0] == "open"]
    assert opened == [("open", str(out_dir), None), ("open", str(out_dir), 8)]
    for name, field in (("loss/training", "loss"), ("loss/held out", "held_out"), ("rate", "rate")):
        told = [(value, step) for first, value, step in
                (each for each in writer.told if len(each) == 3) if first == name]  # fmt: skip
        assert told == [(getattr(step, field), step.number) for step in steps
                        if getattr(step, field) is not None]  # fmt: skip
    assert writer.told[-1] == ("flush",)


def test_answers_are_those_of_the_engine(dialogues, tmp_path):
    data, cpu = read_data(dialogues, DEMO_MODEL_DIR), torch.device("cpu")
    features = picture_features(data, DEMO_MODEL_DIR, "base", tmp_path, device=cpu)
    learner = Learner.load(DEMO_MODEL_DIR, TuneSettings(), device=cpu, dtype=torch.float32)
    samples = Samples(tmp_path, DEMO_MODEL_DIR, data, features, count=4)
    samples.take("after", learner)
    kept = json.loads((tmp_path / SAMPLES_NAME).read_text("utf-8"))
    assert [each["place"] for each in kept] == [each.place for each in data.examples[::3]]
    lines = dialogues.read_text("utf-8").splitlines()
    with MiniGPT4.load(device="cpu", dtype="float32") as model:
        for each in kept:
            messages = json.loads(lines[int(each["place"].split()[-1]) - 1])["messages"]
            is_right = [message["content"] == each["right"] for message in messages]
            asked = messages[: is_right.index(True)]
            path = dialogues.parent / asked[0]["content"][0]["image_url"]["url"]
            picture = {"type": "image_url", "image_url": {"url": str(path)}}
            asked[0]["content"] = [picture, asked[0]["content"][1]]
            assert model.chat(asked).text == each["after"]


def test_what_was_kept_of_other_examples_is_not_taken(tmp_path):
    assert read_samples(tmp_path / SAMPLES_NAME) == []
    (tmp_path / SAMPLES_NAME).write_text('[{"place": "line 1"}]', "utf-8")
    assert read_samples(tmp_path / SAMPLES_NAME) == []
    one = Sample("line 1", "What?", "A ball.", "data:", before="A cube.")
    (tmp_path / SAMPLES_NAME).write_text(json.dumps([vars(one)]), "utf-8")
    assert read_samples(tmp_path / SAMPLES_NAME) == [one]
