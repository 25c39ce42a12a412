"""The cache of keys and values: what is written is read, whatever its format."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import ConfigError, EngineConfig, MiniGPT4
from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape, Int4Cache, Int8Cache
from minigpt4_runtime.cache.sizes import int4_group, token_bytes
from minigpt4_runtime.presets import PRESETS

EXAMPLES = Path(__file__).parents[2] / "examples" / "images"
SHAPE = CacheShape(num_layers=2, num_heads=3, head_dim=4, block_size=5)
NUM_BLOCKS = 6


def new_cache(dtype):
    device = torch.device("cpu")
    return CACHE_FORMATS[dtype].create(SHAPE, NUM_BLOCKS, dtype=dtype, device=device)


def bound(dtype, rows):
    """How far a number of (…, dim) rows may be from what was written."""
    largest = rows.abs().amax(-1, keepdim=True)
    groups = rows.unflatten(-1, (-1, int4_group(rows.shape[-1])))
    step = ((groups.amax(-1) - groups.amin(-1)) / 15).amax(-1, keepdim=True)
    return {
        "float32": torch.zeros(()),
        "float16": rows.abs() * 2**-11,
        "bfloat16": rows.abs() * 2**-8,
        "int8": largest / 127 * 0.5001,
        # Three binary places, or the smallest number that has fewer.
        "fp8": torch.maximum(rows.abs() * 2**-4, largest / 448 * 2**-10) * 1.0001,
        # Half of the largest step, and what 127ths of the lowest and of 15 steps lose.
        "int4": step * (0.501 + 15 / 253) + largest / 253,
    }[dtype]


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
            assert ((side.float() - before[order]).abs() <= bound(dtype, before[order])).all()


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_keys_around_a_centre(dtype):
    """What is read is the keys, the first of a sequence without loss; values have no centre."""
    cache, generator = new_cache(dtype), torch.Generator().manual_seed(0)
    mean, first = torch.randn(2, 2, 3, 4, generator=generator) * 10
    cache.key_centre = cache.find_centre(first, mean)
    keys, values = torch.randn(2, 2, 9, 3, 4, generator=generator)
    keys += mean[:, None]
    keys[:, 0] = first
    for layer in range(2):
        cache.write(layer, torch.arange(9), keys[layer], values[layer])
        read = cache.read(layer, torch.arange(9))
        differences = keys[layer] - cache.key_centre[layer]
        assert ((read[0] - keys[layer]).abs() <= bound(dtype, differences) + 1e-5).all()
        assert ((read[1] - values[layer]).abs() <= bound(dtype, values[layer])).all()
        torch.testing.assert_close(read[0][0], first[layer], atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(sorted(CACHE_FORMATS)), st.permutations(range(NUM_BLOCKS)), st.integers(1, 3)
)
def test_copied_blocks_hold_the_same_in_all_layers(dtype, blocks, count):
    cache, every = new_cache(dtype), torch.arange(NUM_BLOCKS * 5)
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
    sides = (cache.keys, cache.values) if hasattr(cache, "keys") else (cache.numbers, cache.scales)
    held = sum(side.nbytes for side in sides)
    assert SHAPE.block_bytes(dtype) * NUM_BLOCKS == held


def test_a_token_of_the_published_model():
    language = PRESETS["llama2-7b"].language
    assert token_bytes(language, "float16") == 2**19
    shares = {name: token_bytes(language, name) / 2**19 for name in CACHE_FORMATS}
    assert shares == {
        "float32": 2, "float16": 1, "bfloat16": 1, "int8": 0.515625, "fp8": 0.515625,
        "int4": 0.390625,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", ["zeros", "alike", "tiny", "outlier", "nan"])
def test_rows_that_are_hard_to_round(dtype, rows):
    drawn = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    given = {
        "zeros": torch.zeros(4, 3, 64), "alike": torch.full((4, 3, 64), -2.5),
        "tiny": drawn * 1e-6, "outlier": drawn.index_fill(2, torch.tensor(5), 900.0),
        "nan": drawn.index_fill(2, torch.tensor(5), float("nan")),
    }[rows]  # fmt: skip
    cache = CACHE_FORMATS[dtype].create(
        CacheShape(1, 3, 64, 4), 1, dtype=dtype, device=torch.device("cpu")
    )
    cache.write(0, torch.arange(4), given, given)
    for side in cache.read(0, torch.arange(4)):
        if rows == "nan":
            # As with floats, it is seen in the result.
            assert side[:, :, 5].isnan().all()
        else:
            # A float16 holds nothing below 6e-8.
            slack = 1e-6 if dtype == "int4" else 1e-12
            assert ((side - given).abs() <= bound(dtype, given) + slack).all()


def test_the_example_of_the_docs():
    """docs/engine.md shows one head of one token."""
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text("utf-8")
    key, _, int8, int8_read, _, int4, int4_read = (
        [float(number) for number in re.findall(r"-?\d+\.?\d*", line.partition(" and ")[0])][-8:]
        for line in page.partition("```\n")[2].partition("```")[0].splitlines()
        if line
    )
    numbers, scale = Int8Cache.pack(torch.tensor([key]))
    assert numbers[0].tolist() == int8
    assert float(scale) == pytest.approx(0.01)
    packed, scales = Int4Cache.pack(torch.tensor([key]))
    stored = torch.cat((packed[0] & 15, packed[0] >> 4))
    assert stored.view(4, 2).T.flatten().tolist() == int4
    assert packed[0].tolist() == [189, 244, 240, 5]
    assert scales[0, :4].view(torch.float16).tolist() == pytest.approx([0.1256, 1.0078], abs=1e-4)
    assert scales[0, 4:].tolist() == [119, 127, -127, -76]
    for cache, parts, read in ((Int8Cache, (numbers, scale), int8_read),
                               (Int4Cache, (packed, scales), int4_read)):  # fmt: skip
        assert [round(number, 2) for number in cache.unpack(*parts)[0].tolist()] == read


def test_the_centre_of_the_docs():
    """docs/engine.md shows how the centre of int4 is found."""
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text("utf-8")
    (example,) = re.findall(r"```\n(mean .*?)```", page, re.DOTALL)
    mean, first, difference, rounded, centre = (
        torch.tensor([float(number) for number in re.findall(r"-?\d+\.\d+", line)[:4]])
        for line in example.splitlines()
    )
    found = Int4Cache.find_centre(first, mean)
    for shown, is_shown in ((difference, first - mean), (rounded, first - found), (centre, found)):
        torch.testing.assert_close(shown, is_shown, atol=0.005, rtol=0)
    assert torch.equal(Int4Cache.as_read(first - found, "int4"), first - found)


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
