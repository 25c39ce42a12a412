"""The contract of attention kernels, and the reference against torch's own attention."""

import pytest
import torch
from torch.nn import functional

from minigpt4_runtime.backend.contracts import BatchLayout, KeyValueCache, SequenceSlice
from minigpt4_runtime.backend.registry import ATTENTION_KERNELS, attention_kernel

TOLERANCE = {"reference": 1e-5}
HEADS = [(4, 4), (4, 2), (6, 1)]


def test_every_kernel_has_a_tolerance():
    assert set(TOLERANCE) == set(ATTENTION_KERNELS)


def random_qkv(num_tokens, num_heads, num_kv_heads, generator):
    return (
        torch.randn(num_tokens, heads, 8, generator=generator)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )


def dense(q, k, v):
    """torch's causal attention over one whole sequence."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    repeats = len(q) // len(k)
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ATTENTION_KERNELS)
def test_ragged_batches_in_chunks_equal_whole_sequences(name, heads):
    kernel, generator = attention_kernel(name), torch.Generator().manual_seed(sum(heads))
    lengths, num_kv_heads = [7, 1, 12], heads[1]
    whole = [tuple(random_qkv(length, *heads, generator)) for length in lengths]
    slots = torch.randperm(sum(lengths) + 3, generator=generator)[: sum(lengths)].split(lengths)
    cache = KeyValueCache(*(torch.zeros(sum(lengths) + 3, num_kv_heads, 8) for _ in range(2)))
    outputs = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        pieces, sequences, row = [], [], 0
        for index, length in enumerate(lengths):
            count = min(int(torch.randint(1, 5, (), generator=generator)), length - done[index])
            if count == 0:
                continue
            piece = slice(done[index], done[index] + count)
            pieces.append((index, [x[piece] for x in whole[index]]))
            sequences.append(SequenceSlice(row, count, slots[index][: done[index] + count]))
            row, done[index] = row + count, done[index] + count
        q, k, v = (torch.cat([qkv[i] for _, qkv in pieces]) for i in range(3))
        attended = kernel(q, k, v, cache=cache, batch=BatchLayout(tuple(sequences)))
        for (index, _), sequence in zip(pieces, sequences, strict=True):
            outputs[index].append(attended[sequence.first_row :][: sequence.num_rows])
    for qkv, output in zip(whole, outputs, strict=True):
        assert torch.allclose(torch.cat(output), dense(*qkv), atol=TOLERANCE[name])
