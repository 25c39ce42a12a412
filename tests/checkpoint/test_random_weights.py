"""Random weights: of the right shapes, reproducible, finite all the way, and refused in time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4_runtime import BackendUnavailableError, ConfigError, MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.model.parallel import Solo

DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"
DEMO = load_config(DEMO_DIR)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_there_in_its_dtype_and_the_same_seed_gives_the_same(dtype):
    def make(seed):
        source = WeightSource(DEMO, seed=seed)
        model = source.load_model(device=CPU, dtype=dtype, free_bytes=None, group=Solo())
        return model.state_dict()

    model, again, other = make(1), make(1), make(2)
    assert {name: tuple(weight.shape) for name, weight in model.items()} == model_shapes(DEMO)
    assert all(weight.dtype == dtype for weight in model.values())
    assert all(torch.equal(weight, again[name]) for name, weight in model.items())
    assert not torch.equal(model["language.head.weight"], other["language.head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_deep_model_computes_finite_numbers(dtype):
    language = replace(DEMO.language, num_hidden_layers=60, vocab_size=2000)
    vision = replace(DEMO.vision, num_hidden_layers=40)
    config = replace(DEMO, language=language, vision=vision)
    model = MiniGPT4.with_random_weights(config, device="cpu", dtype=dtype)
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    rows = model.embed_images([picture])
    assert rows.isfinite().all()
    assert 0.01 < float(rows.std()) < 100
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True, stop=())
    reply = model.describe(picture, sampling=sampling)
    assert reply.usage.completion_tokens == 5
    assert (model.model_dir, model.dtype, model.device) == (None, dtype, "cpu")


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32-asymmetric", "w8a16-sparse24"])
def test_quantised_weights_repeat_the_rows_that_were_drawn(name):
    language = replace(DEMO.language, intermediate_size=1024, vocab_size=2000)
    config = replace(DEMO, language=language)
    model = MiniGPT4.with_random_weights(config, device="cpu", formats={"language.layers": name})
    gate = model._loaded.rank_model.language.layers[0].mlp_gate
    floats = gate(torch.eye(language.hidden_size)).T
    assert floats.shape == (1024, language.hidden_size)
    assert floats[:256].unique(dim=0).shape[0] == 256
    assert all(torch.equal(floats[:256], floats[i : i + 256]) for i in (256, 512, 768))
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True, stop=())
    picture = np.zeros((50, 60, 3), dtype=np.uint8)
    assert model.describe(picture, sampling=sampling).usage.completion_tokens == 3


def test_too_little_memory_is_said_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda self: 10**6)
    with pytest.raises(BackendUnavailableError, match=r"This shape takes .* MiB in float32"):
        MiniGPT4.with_random_weights(DEMO, device="cpu")


def test_a_shape_without_room_for_the_tokenizer_is_refused():
    config = replace(DEMO, language=replace(DEMO.language, vocab_size=100))
    with pytest.raises(ConfigError, match=r"vocab_size is 100; .* at least the 640 ids"):
        MiniGPT4.with_random_weights(config, device="cpu")


@pytest.mark.parametrize("source", [WeightSource(DEMO, seed=7), WeightSource.folder(DEMO_DIR)])
def test_a_source_goes_from_rank_to_rank_as_plain_values(source):
    assert WeightSource.from_mapping(json.loads(json.dumps(source.to_mapping()))) == source
