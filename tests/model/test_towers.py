"""Each tower against a plain transcription of its paper, on fresh random weights."""

import pytest
import torch
from torch.nn import functional

from minigpt4_runtime.config import LanguageConfig, VisionConfig
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.eva_vit import EvaVit, resize_positions
from minigpt4_runtime.model.llama import Llama, RMSNorm
from minigpt4_runtime.model.rotary import Rotation


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_torch_s(dtype):
    norm = randomise(RMSNorm(96, 1e-6)).to(dtype)
    hidden = (torch.randn(5, 96, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    hidden[0] *= 1e-4  # Where eps counts.
    theirs = norm.weight * functional.rms_norm(hidden.float(), (96,), eps=1e-6).to(dtype)
    assert torch.allclose(norm(hidden), theirs, rtol=3 * torch.finfo(dtype).eps, atol=0)


def test_rotation_keeps_distances_only():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, 8, generator=generator)
    config = LanguageConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, max_position_embeddings=128, rms_norm_eps=1e-6,
    )  # fmt: skip

    def score(query_position, key_position):
        turn_q = Rotation(torch.tensor([query_position]), config, torch.float32)
        turn_k = Rotation(torch.tensor([key_position]), config, torch.float32)
        return float((turn_q(q) * turn_k(k)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_llama_sees_only_the_past():
    config = LanguageConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=20, max_position_embeddings=64, rms_norm_eps=1e-6,
    )  # fmt: skip
    llama = randomise(Llama(config))
    ids = torch.arange(10)
    whole = llama(llama.embed(ids), torch.arange(10), causal_attention())
    changed = ids.clone()
    changed[7:] = 3
    prefix = llama(llama.embed(changed), torch.arange(10), causal_attention())
    assert torch.allclose(whole[:7], prefix[:7], atol=1e-6)
    assert not torch.allclose(whole[8], prefix[8], atol=1e-3)
    assert llama.logits(whole[-1:]).shape == (1, 20)


def test_vit_puts_the_class_row_first_and_knows_places():
    config = VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    vit = randomise(EvaVit(config))
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    rows = vit(pixels)
    assert rows.shape == (3, 5, 32)
    assert torch.allclose(vit(pixels[1:2])[0], rows[1], atol=1e-5)
    # Without positions the patches are a set: swapping two patches swaps their rows.
    vit.position_embedding.zero_()
    swapped = pixels.clone()
    swapped[..., :14], swapped[..., 14:] = pixels[..., 14:], pixels[..., :14]
    assert torch.allclose(vit(swapped)[:, [0, 2, 1, 4, 3]], vit(pixels), atol=1e-5)


def test_resized_positions_keep_the_class_row_and_flat_tables():
    table = torch.randn(17, 6, generator=torch.Generator().manual_seed(4))
    assert resize_positions(table, 16) is table
    larger = resize_positions(table, 25)
    assert larger.shape == (26, 6)
    assert torch.equal(larger[0], table[0])
    flat = torch.ones(17, 6)
    assert torch.allclose(resize_positions(flat, 49), torch.ones(50, 6), atol=1e-5)
