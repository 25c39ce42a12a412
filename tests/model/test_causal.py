"""Dense attention over packed sequences is that of each sequence, token by token."""

import pytest
import torch

from minigpt4_runtime.model.causal import causal_attention, packed_attention


@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
def test_packed_sequences_attend_to_their_own_past(num_key_heads):
    q, k, v = (torch.randn(3 * 5, heads, 8) for heads in (4, num_key_heads, num_key_heads))
    together = causal_attention(3)(0, q, k, v)
    for first in range(0, 15, 5):
        rows = slice(first, first + 5)
        assert torch.allclose(together[rows], causal_attention()(0, q[rows], k[rows], v[rows]))
    for token in range(5, 10):
        for head in range(4):
            key_head = head * num_key_heads // 4
            past = slice(5, token + 1)
            shares = torch.softmax(k[past, key_head] @ q[token, head] / 8**0.5, 0)
            wanted = shares @ v[past, key_head]
            assert torch.allclose(together[token, head], wanted, atol=1e-6)


@pytest.mark.parametrize("num_key_heads", [1, 4])
def test_sequences_of_any_length_attend_as_under_a_mask_of_blocks(num_key_heads):
    lengths = (3, 1, 7)
    q, k, v = (torch.randn(11, heads, 8) for heads in (4, num_key_heads, num_key_heads))
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    is_seen = (owners[:, None] == owners) & torch.ones(11, 11).tril().bool()
    k_all, v_all = (rows.repeat_interleave(4 // num_key_heads, 1) for rows in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k_all) / 8**0.5
    shares = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", shares, v_all)
    assert torch.allclose(packed_attention(lengths)(0, q, k, v), wanted, atol=1e-6)
