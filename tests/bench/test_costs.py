"""Operations and bytes, against what torch counts."""

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minigpt4_runtime import ConfigError, MiniGPT4
from minigpt4_runtime.bench.costs import vision_gigaflops
from minigpt4_runtime.bench.presets import cut_layers, find_preset
from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.kernels import native
from minigpt4_runtime.presets import PRESETS


@pytest.mark.parametrize("name", ["vicuna", "llama2", "minigptv2"])
def test_a_picture_takes_what_torch_counts(monkeypatch, name, golden_model_dir):
    # torch counts its own operations only, and of them not the CPU's fused attention.
    monkeypatch.setattr(native, "float_product", lambda: None)
    model = MiniGPT4.load(golden_model_dir(name), device="cpu")
    side = model.config.vision.image_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.embed_images([np.zeros((side, side, 3), np.uint8)])
    assert vision_gigaflops(model.config) == pytest.approx(counter.get_total_flops() / 1e9)


def test_a_token_of_a_7b_model_takes_half_a_mebibyte_in_half_precision():
    assert token_bytes(PRESETS["llama2-7b"].language, "float16") == 2**19
    assert token_bytes(PRESETS["llama2-7b"].language, "float32") == 2**20


@pytest.mark.parametrize(
    ("name", "billions", "rows"),
    [
        ("vicuna-7b", 6.74, 32),
        ("vicuna-13b", 13.02, 32),
        ("llama2-7b", 6.74, 64),
        ("minigpt-v2", 6.74, 256),
    ],
)
def test_presets_have_the_published_sizes(name, billions, rows):
    language = blank_model(PRESETS[name]).language
    count = sum(weight.numel() for weight in language.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)
    assert PRESETS[name].rows_per_image == rows


def test_layers_are_cut_on_each_side_and_never_added():
    config = cut_layers(PRESETS["vicuna-7b"], vision=20, language=2)
    assert config.vision.num_hidden_layers == 20
    assert config.qformer.num_hidden_layers == 12
    assert config.language.num_hidden_layers == 2
    assert cut_layers(config) == config


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="'vicuna-70b'; known are vicuna-7b, vicuna-13b, llama"):
        find_preset("vicuna-70b")
