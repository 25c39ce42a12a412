"""VLMEvalKit's messages reach the model as they are; its base class is faked."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.messages import ImageSource, Reply, Usage

FILE = Path(__file__).parents[2] / "integrations" / "vlmevalkit_model.py"


class Model:
    def __init__(self):
        self.asked = []

    def chat(self, messages, sampling):
        self.asked.append((messages[0]["content"], sampling))
        return Reply("A dog.", (1,), "stop", Usage(1, 1))


@pytest.fixture
def vlmevalkit_model(monkeypatch):
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = type("BaseModel", (), {})
    spec = importlib.util.spec_from_file_location("vlmevalkit_model", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_message_is_asked(vlmevalkit_model, monkeypatch, tmp_path):
    model, loaded = Model(), []

    class Loader:
        @staticmethod
        def load(name, **settings):
            loaded.append((name, settings))
            return model

    monkeypatch.setattr(vlmevalkit_model, "MiniGPT4", Loader)
    sampling = SamplingParams(max_new_tokens=7)
    asker = vlmevalkit_model.MiniGPT4Runtime("vicuna-7b", sampling=sampling, device="cpu")
    assert loaded == [("vicuna-7b", {"device": "cpu"})]
    parts = [("text", "One:"), ("image", "a.png"), ("text", "Is it?"), ("text", "Yes or no.")]
    message = [{"type": kind, "value": value} for kind, value in parts]
    assert asker.generate_inner(message, dataset="MME") == "A dog."
    (first, picture, last), used = model.asked[0]
    assert (first, last, used) == ("One:", "Is it?\nYes or no.", sampling)
    assert isinstance(picture, ImageSource)
    assert picture.name.endswith("a.png")


def test_what_cannot_be_served_is_an_error_that_it_can_skip(vlmevalkit_model, tmp_path):
    asker = vlmevalkit_model.MiniGPT4Runtime(device="cpu")
    with pytest.raises(RuntimeError, match=r"gone\.png"):
        asker.generate_inner([{"type": "image", "value": str(tmp_path / "gone.png")}])
