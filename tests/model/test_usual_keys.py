"""What keys have in common, held to the keys of the same text seen from outside."""

import pytest
import torch

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.model.usual_keys import usual_keys


@pytest.mark.parametrize(("context_length", "num_ids"), [(9, 9), (200, 64)])
def test_the_keys_of_one_text(context_length, num_ids):
    config = LanguageConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=context_length,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    language = Llama(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in language.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    first, mean = usual_keys(language)
    again = usual_keys(language)
    assert torch.equal(first, again[0])
    assert torch.equal(mean, again[1])

    ids = torch.randint(50, (num_ids,), generator=torch.Generator().manual_seed(0))
    straight = []
    for layer in language.layers:
        layer.attention.key.register_forward_hook(lambda *called: straight.append(called[2]))
    positions = torch.arange(num_ids)
    language(language.embed(ids), positions, causal_attention())
    rotate = Rotation(positions, config, torch.float32)
    keys = torch.stack([rotate(rows.view(num_ids, 2, 4)) for rows in straight])
    torch.testing.assert_close(first, keys[:, 0])
    torch.testing.assert_close(mean, keys[:, 1:].mean(1))
