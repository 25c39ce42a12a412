"""What the public API offers to those who measure: stages, tokens as they come, fresh engines."""

import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from minigpt4_runtime import (
    BackendUnavailableError,
    ConfigError,
    MiniGPT4,
    RequestError,
    SamplingParams,
)
from minigpt4_runtime.engine.runner import Runner

IMAGES = Path(__file__).parent / "goldens/vicuna/images"
PICTURES = [IMAGES / name for name in ("photo_rgb.jpg", "grey.png", "alpha.png")]
FREE = SamplingParams(max_new_tokens=6, ignore_eos=True, stop=())


@pytest.fixture
def model(golden_model_dir) -> MiniGPT4:
    return MiniGPT4.load(golden_model_dir("vicuna"), device="cpu")


def test_stages_are_heard_as_they_end_and_change_nothing(model):
    stages = []
    rows = model.probe.embed_images(PICTURES, at_once=2, on_stage=stages.append)
    opening = ["decode", "preprocess"]
    assert stages == [*opening * 2, "tower", "projection", *opening, "tower", "projection"]
    assert torch.equal(rows, model.probe.embed_images(PICTURES, at_once=2))
    assert torch.allclose(rows, model.embed_images(PICTURES), atol=1e-5)
    with pytest.raises(RequestError, match="at_once is 0"):
        model.probe.embed_images(PICTURES, at_once=0)


def test_tokens_are_the_same_as_a_prompt_s_and_heard_as_they_come(model):
    messages = [{"role": "user", "content": ["Why?"]}]
    prompt = model.encode_prompt(messages).token_ids
    heard = []
    ids = list(model.probe.submit_tokens(prompt, FREE, on_token=heard.append))
    assert tuple(ids) == model.chat(messages, FREE).token_ids
    assert heard == ids
    assert list(model.probe.submit_tokens(prompt, FREE)) == ids
    to_the_end = SamplingParams(logit_bias={model._tokenizer.eos_id: 100})
    ids, heard = list(model.probe.submit_tokens(prompt, to_the_end, on_token=heard.append)), heard
    assert heard[-1:] == ids == [model._tokenizer.eos_id]


@pytest.mark.parametrize("token_ids", [[], [-1], [10**9]])
def test_ids_that_are_none_are_refused(model, token_ids):
    with pytest.raises(RequestError, match="one or more ids from 0 to"):
        model.probe.submit_tokens(token_ids)
    with pytest.raises(RequestError, match="leave out on_token"):
        model.probe.submit_tokens([1], SamplingParams(num_beams=2), on_token=print)


def test_a_fresh_engine_answers_alike_and_has_kept_nothing(model):
    before = model.describe(PICTURES[0], sampling=FREE)
    model.probe.use_engine({"max_running": 2, "num_blocks": 50})
    assert model.stats().num_blocks == 50
    assert model.engine_config.max_running == 2
    assert model.describe(PICTURES[0], sampling=FREE) == before
    stats = model.stats()
    assert (stats.num_encoded_images, stats.num_reused_tokens) == (1, 0)
    endless = model.probe.submit_tokens([1, 5], SamplingParams(max_new_tokens=700, ignore_eos=True))
    model.probe.use_engine({"max_running": 3})
    with pytest.raises(RequestError, match="The model was closed"):
        list(endless)


def test_the_last_cache_is_gone_before_the_next_is_made(model):
    model.describe(PICTURES[0], sampling=FREE)
    last = weakref.ref(model._loaded.engine._runner)
    model.probe.use_engine({"num_blocks": 10})
    assert last() is None
    model.close()
    assert model.stats().num_encoded_images == 0


def test_settings_that_cannot_be_leave_the_model_as_it_was(model, monkeypatch):
    made, num_made = Runner.__init__, itertools.count()

    def run_out_once(self, *args, **settings):
        if next(num_made) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made(self, *args, **settings)

    config = model.engine_config
    before = model.describe(PICTURES[0], sampling=FREE)
    monkeypatch.setattr(Runner, "__init__", run_out_once)
    with pytest.raises(BackendUnavailableError, match="cpu has no memory for 7000 blocks of 16"):
        model.probe.use_engine({"num_blocks": 7000})
    with pytest.raises(ConfigError, match="Did you mean 'num_blocks'"):
        model.probe.use_engine({"num_block": 7000})
    assert model.engine_config == config
    assert model.describe(PICTURES[0], sampling=FREE) == before


def test_all_ranks_go_on_with_a_fresh_engine():
    alone = MiniGPT4.load(device="cpu").describe(PICTURES[0], sampling=FREE)
    with MiniGPT4.load(device="cpu", tensor_parallel=2) as model:
        for max_running in (1, 3):
            model.probe.use_engine({"max_running": max_running})
            assert model.describe(PICTURES[0], sampling=FREE) == alone
        model.close()
        with pytest.raises(RequestError, match="The model was closed"):
            model.describe(PICTURES[0])


def test_a_model_without_files_can_be_divided():
    config = MiniGPT4.load(device="cpu").config
    with MiniGPT4.with_random_weights(config, device="cpu", tensor_parallel=2) as model:
        assert len(list(model.probe.submit_tokens([3, 4], FREE))) == 6
        layers = model.probe.weight_bytes()["layers"]
        with pytest.raises(RequestError, match="Ranks share this model"):
            model.probe.expect([3], [4], image_rows={})
    whole = MiniGPT4.with_random_weights(config, device="cpu").probe.weight_bytes()["layers"]
    assert layers == pytest.approx(whole / 2, rel=0.01)  # Norms are whole on each rank.


def test_what_is_expected_has_a_row_for_each_token_of_the_answer(model):
    vocab_size = model.config.language.vocab_size
    for answer in ([4], [4, 5, 6]):
        expected = model.probe.expect([1, 3], answer, image_rows={})
        assert expected.shape == (len(answer), vocab_size)
        assert torch.allclose(expected.exp().sum(1), torch.ones(len(answer)).double())


def test_weights_are_counted_where_they_are(model):
    weights = model.probe.weight_bytes()
    file_bytes = sum(path.stat().st_size for path in model.model_dir.glob("*.safetensors"))
    assert set(weights) == {"vision", "embedding", "layers", "head"}
    # The folder holds the same in the dtypes of the published files, and a norm is in no part.
    assert 0.5 < sum(weights.values()) / file_bytes < 2.1
    half = MiniGPT4.load(model.model_dir, device="cpu", dtype="float16").probe.weight_bytes()
    assert {name: half[name] * 2 for name in ("embedding", "layers", "head")} == {
        name: weights[name] for name in ("embedding", "layers", "head")
    }


PEAK = """
import sys
import torch
from minigpt4_runtime import MiniGPT4

model = MiniGPT4.load(sys.argv[1], device="cpu")
model.probe.reset_peak_memory()
before = model.probe.peak_memory_bytes()
block = torch.ones(16 * 2**20)
peak = model.probe.peak_memory_bytes()
assert peak >= before + 60 * 2**20, (before, peak)
del block
model.probe.reset_peak_memory()
after = model.probe.peak_memory_bytes()
assert after <= peak - 50 * 2**20, (peak, after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
def test_the_peak_of_memory_counts_from_its_reset(golden_model_dir):
    # In a process of its own: what earlier tests left is freed at any time, even between two lines.
    subprocess.run([sys.executable, "-c", PEAK, str(golden_model_dir("vicuna"))], check=True)
