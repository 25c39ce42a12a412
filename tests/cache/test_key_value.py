"""The cache of keys and values: what is written is read, whatever its format."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import ConfigError, EngineConfig, MiniGPT4
from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape, token_bytes
from minigpt4_runtime.presets import PRESETS

EXAMPLES = Path(__file__).parents[2] / "examples" / "images"
SHAPE = CacheShape(num_layers=2, num_heads=3, head_dim=4, block_size=5)
NUM_BLOCKS = 6


def new_cache(dtype):
    device = torch.device("cpu")
    return CACHE_FORMATS[dtype].create(SHAPE, NUM_BLOCKS, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", CACHE_FORMATS)
def test_what_is_written_is_read(dtype):
    cache, generator = new_cache(dtype), torch.Generator().manual_seed(0)
    slots = torch.randperm(NUM_BLOCKS * 5, generator=generator)[:9]
    rows = [torch.randn(9, 3, 4, generator=generator) for _ in range(4)]
    cache.write(0, slots, *rows[:2])
    cache.write(1, slots, *rows[2:])
    order = torch.randperm(9, generator=generator)
    for layer, written in enumerate((rows[:2], rows[2:])):
        for side, before in zip(cache.read(layer, slots[order]), written, strict=True):
            assert side.is_floating_point()
            torch.testing.assert_close(side.float(), before[order], atol=0.02, rtol=0.01)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(NUM_BLOCKS)), st.integers(1, 3))
def test_copied_blocks_hold_the_same_in_all_layers(blocks, count):
    cache, every = new_cache("float32"), torch.arange(NUM_BLOCKS * 5)
    for layer in range(2):
        cache.write(layer, every, torch.randn(30, 3, 4), torch.randn(30, 3, 4))
    sources, targets = blocks[:count], blocks[count : 2 * count]
    before = [cache.read(layer, every) for layer in range(2)]
    cache.copy_blocks(sources, targets)
    for layer in range(2):
        for side, old in zip(cache.read(layer, every), before[layer], strict=True):
            expected = old.view(NUM_BLOCKS, 5, 3, 4).clone()
            expected[targets] = expected[sources]
            assert torch.equal(side.view_as(expected), expected)


@pytest.mark.parametrize("dtype", CACHE_FORMATS)
def test_a_block_takes_what_it_says(dtype):
    cache = new_cache(dtype)
    held = cache.keys.nbytes + cache.values.nbytes
    assert type(cache).block_bytes(SHAPE, dtype) * NUM_BLOCKS == held


def test_a_token_of_the_published_model():
    assert token_bytes(PRESETS["llama2-7b"].language, "float16") == 2**19


def test_halves_answer_alike():
    demo_picture = EXAMPLES / sorted(path.name for path in EXAMPLES.iterdir())[0]
    with MiniGPT4.load(engine={"cache_dtype": "bfloat16"}) as model:
        halves = model.describe(demo_picture)
        cache = model._loaded.engine._runner._cache
        assert (cache.dtype, cache.keys.dtype) == (torch.bfloat16, torch.bfloat16)
    with MiniGPT4.load() as model:
        assert model._loaded.engine._runner._cache.dtype == torch.float32
        assert model.describe(demo_picture).text == halves.text


def test_a_dtype_that_is_none():
    with pytest.raises(ConfigError, match="cache_dtype is 'int3'; it must be auto or float32, fl"):
        EngineConfig(cache_dtype="int3")
