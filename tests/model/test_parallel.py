"""Several ranks compute what one does: in threads here, in processes in tests/test_ranks.py."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.parallel import check_world_size, share, split_dimension
from minigpt4_runtime.model.usual_keys import usual_keys

SEVEN_B = LanguageConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6,
)  # fmt: skip


class Room:
    """Where the ranks of a group, each in a thread, put down what they give."""

    def __init__(self, size):
        self.size = size
        self.given = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class ThreadGroup:
    """A rank among threads, which counts what it takes part in."""

    def __init__(self, room, rank):
        self._room, self.rank, self.size, self.num_calls = room, rank, room.size, 0

    def _exchange(self, rows):
        self.num_calls += 1
        self._room.given[self.rank] = rows.clone()
        self._room.barrier.wait()
        given = list(self._room.given)
        self._room.barrier.wait()
        return given

    def sum(self, rows):
        return rows.copy_(sum(self._exchange(rows)))

    def join(self, rows):
        return torch.cat(self._exchange(rows), dim=-1)


def part_of(whole, group):
    """The weights of a rank, cut out of a whole model's."""
    weights = {}
    for name, weight in whole.state_dict().items():
        dimension = split_dimension(name)
        if dimension is not None:
            held = share(weight.shape[dimension], group)
            weight = weight.narrow(dimension, held.start, len(held))
        weights[name] = weight
    return weights


def answer(llama, ids):
    embeddings = llama.group.sum(llama.embed(ids))
    hidden = llama(embeddings, torch.arange(len(ids)), causal_attention())
    return embeddings, llama.logits(hidden)


def know_keys(llama):
    """Of all heads, which lie side by side."""
    return [llama.group.join(keys.flatten(1)) for keys in usual_keys(llama)]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_together_as_one(data):
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = size * data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 2))
    config = LanguageConfig(
        hidden_size=heads * 4, intermediate_size=size * data.draw(st.integers(1, 5)),
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=data.draw(st.integers(57, 64)), max_position_embeddings=64, rms_norm_eps=1e-6,
    )  # fmt: skip
    check_world_size(config, size)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    whole = Llama(config).requires_grad_(False)
    for weight in whole.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    ids = torch.randint(0, config.vocab_size, (11,), generator=generator)
    room = Room(size)
    groups = [ThreadGroup(room, rank) for rank in range(size)]

    def answer_in_part(group):
        llama = Llama(config, group).requires_grad_(False)
        llama.load_state_dict(part_of(whole, group))
        answered, num_calls = answer(llama, ids), group.num_calls
        # Two a layer, one for the embeddings, one for the logits.
        assert num_calls == 2 * config.num_hidden_layers + 2
        return *answered, *know_keys(llama)

    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(answer_in_part, groups))
    expected = [*answer(whole, ids), *know_keys(whole)]
    for mine in answers:
        for ours, theirs in zip(mine, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@given(length=st.integers(1, 40000), size=st.integers(1, 16))
def test_every_row_has_one_holder(length, size):
    room = Room(size)
    held = [row for rank in range(size) for row in share(length, ThreadGroup(room, rank))]
    assert held == list(range(length))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_the_published_sizes_can_be_divided(size):
    check_world_size(SEVEN_B, size)
    # Vicuna's first release has one id more, which no number divides.
    check_world_size(replace(SEVEN_B, vocab_size=32001), size)


@pytest.mark.parametrize("size", [0, -1, 3, 5, 64])
def test_other_numbers_are_refused_with_those_that_fit(size):
    with pytest.raises(ConfigError, match=r"tensor_parallel is .*32 heads.*1, 2, 4, 8, 16, 32\."):
        check_world_size(SEVEN_B, size)


def test_no_rank_is_left_without_an_id():
    tiny = replace(SEVEN_B, vocab_size=9)
    with pytest.raises(ConfigError, match=r"It can be 1, 2\."):
        check_world_size(tiny, 8)
