"""Attention over quantised keys and values, by every kernel that reads them.

Each kernel is held to the reference on the same cache, whose unwritten slots are NaN; and each
format to a cache of floats.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from step_batches import Cached, batch_of, draw, lay_out, slots_before
from torch import Tensor
from triton_cases import mend_rounding, need_fewer_programs, skip_unless_interpreted

from minigpt4_runtime.cache.key_value import (
    CACHE_FORMATS,
    CacheShape,
    FloatCache,
    Int4Cache,
    KeyValueCache,
    QuantisedCache,
)
from minigpt4_runtime.kernels import attention_sdpa
from minigpt4_runtime.kernels.attention_reference import ReferenceAttention
from minigpt4_runtime.kernels.registry import ATTENTION_KERNELS, attention_kernel

FORMATS = [name for name, each in CACHE_FORMATS.items() if issubclass(each, QuantisedCache)]
# Which kernels read which formats; "sdpa" and the reference read all.
READ_BY = {
    "sdpa": FORMATS,
    "native": ["int8", "int4"],
    "triton": ["int8", "int4", "fp8"],
}
CASES = [(kernel, name) for kernel, names in READ_BY.items() for name in names]
# How far attention is from that over floats, for keys and values from a normal distribution: the
# root of the mean square, as a share of that of the result.
COST = {"int8": 0.015, "fp8": 0.06, "int4": 0.1}
CPU = torch.device("cpu")
UNWRITTEN = 255  # Bytes of these are NaN, as any float.
RAGGED = [(37, 1), (20, 7), (1, 1), (6, 6), (16, 1)]
# (4, 2) heads share keys; 40 is no multiple of 32, 24 of no vector, and 6 of no group of int4.
SHAPES = [((4, 4), 32), ((4, 2), 128), ((6, 1), 40), ((3, 3), 24), ((2, 2), 6)]


@dataclass(frozen=True)
class Step:
    """What was written before a step, and its own rows."""

    shape: CacheShape
    sequences: list[Cached]
    before: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor, Tensor]
    key_centre: Tensor | None = None

    def cache(self, name: str) -> KeyValueCache:
        """A cache of that format before the step. Slots that nobody wrote to are NaN."""
        num_blocks = max(max(each.blocks) for each in self.sequences) + 2
        cache = CACHE_FORMATS[name].create(self.shape, num_blocks, dtype=name, device=CPU)
        sides = (cache.keys, cache.values) if isinstance(cache, FloatCache) else (cache.scales,)
        for side in sides:
            side.view(torch.uint8).fill_(UNWRITTEN)
        if isinstance(cache, QuantisedCache):
            cache.key_centre = self.key_centre
        slots = torch.tensor(slots_before(self.sequences, self.shape.block_size))
        for layer in range(self.shape.num_layers):
            cache.write(layer, slots, *self.before)
        return cache

    def run(self, kernel, cache: KeyValueCache, dtype=torch.float32) -> Tensor:
        """What a kernel gives for the second layer."""
        attend = kernel(cache)(batch_of(self.sequences, self.shape.block_size))
        output = attend(1, *(x.to(dtype) for x in self.qkv))
        assert output.dtype == dtype
        return output.float()


def draw_step(lengths, *, heads=(4, 2), head_dim=32, block_size=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sequences = lay_out(lengths, block_size, generator)
    num_before = len(slots_before(sequences, block_size))
    num_rows = sum(each.num_rows for each in sequences)
    before = tuple(draw(generator, num_before, heads[1], head_dim) for _ in range(2))
    qkv = tuple(
        draw(generator, num_rows, count, head_dim, dtype=dtype) for count in (*heads, heads[1])
    )
    return Step(CacheShape(2, heads[1], head_dim, block_size), sequences, before, qkv)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, monkeypatch):
    kernel, name = request.param
    if kernel == "native":
        pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
    if kernel == "triton":
        skip_unless_interpreted()
        mend_rounding(monkeypatch)
        need_fewer_programs(monkeypatch)
    return attention_kernel(kernel), name


def test_the_table_of_readers_is_complete():
    """A kernel that takes a format is held to the reference with it."""
    for kernel in ATTENTION_KERNELS:
        if kernel in {"reference", "npu"}:
            continue
        if kernel == "native":
            pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
        if kernel == "triton":
            pytest.importorskip("triton", reason="triton is not installed")
        limits = attention_kernel(kernel).limits
        step = draw_step(RAGGED)
        taken = [name for name in FORMATS if limits.takes(step.cache(name))]
        assert sorted(taken) == sorted(READ_BY.get(kernel, []))


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_a_ragged_step_is_the_references(case, heads, head_dim, block_size):
    """Also: what it writes is the same, and it writes nothing else.

    Keys have a centre: the reference adds it again, and others leave it out of all scores.
    """
    kernel, name = case
    if name == "int4" and head_dim == 6:
        pytest.skip("no model keeps such heads in int4")
    if kernel is attention_kernel("triton") and SHAPES.index((heads, head_dim)) % 2 == (
        block_size == 1
    ):
        pytest.skip("Triton's interpreter is given each shape in blocks of one size")
    step = draw_step(RAGGED, heads=heads, head_dim=head_dim, block_size=block_size)
    centre = draw(torch.Generator().manual_seed(1), 2, heads[1], head_dim)
    step = replace(step, key_centre=centre)
    cache, twin = step.cache(name), step.cache(name)
    found, expected = step.run(kernel, cache), step.run(ReferenceAttention, twin)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # What belongs to a head last, as bytes.
    scales, twins = (
        x.scales.view(torch.uint8).view(*x.numbers.shape[:5], -1) for x in (cache, twin)
    )
    written = (twins != UNWRITTEN).any(-1)
    assert torch.equal(
        cache.numbers.view(torch.uint8)[written], twin.numbers.view(torch.uint8)[written]
    )
    assert torch.equal(scales, twins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_half_precision(case, dtype):
    kernel, name = case
    if (kernel, dtype) == (attention_kernel("triton"), torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies bfloat16 as if they were integers")
    step = draw_step(RAGGED, head_dim=128, block_size=16, dtype=dtype)
    found = step.run(kernel, step.cache(name), dtype)
    expected = step.run(ReferenceAttention, step.cache(name))
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("lengths", [[(700, 1), (3, 1)], [(300, 70), (3, 1)]])
def test_long_contexts(case, lengths):
    kernel, name = case
    if kernel is attention_kernel("triton") and lengths[0][1] > 1:
        lengths = [(300, 34), (3, 1)]  # Of a prompt more than a program takes, and few for all.
    step = draw_step(lengths, head_dim=64, block_size=16)
    found, expected = (step.run(each, step.cache(name)) for each in (kernel, ReferenceAttention))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [RAGGED, [(700, 1), (3, 1)], [(650, 100), (3, 1)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", READ_BY["triton"])
def test_triton_reads_them_on_a_gpu(name, dtype, lengths):
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    step = draw_step(lengths, head_dim=128, block_size=16, dtype=dtype)
    cache = step.cache(name)
    there = type(cache)(cache.numbers.to("cuda"), cache.scales.to("cuda"), cache.shape.head_dim)
    attend = attention_kernel("triton")(there)(batch_of(step.sequences, 16, "cuda"))
    found = attend(1, *(x.to("cuda", dtype) for x in step.qkv)).float().cpu()
    expected = step.run(ReferenceAttention, cache)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_prompt_is_widened_a_few_heads_at_a_time(monkeypatch):
    step = draw_step([(90, 60)], heads=(6, 3), head_dim=64, block_size=16)
    expected = step.run(ReferenceAttention, step.cache("int8"))
    monkeypatch.setattr(attention_sdpa, "_WIDENED_BYTES", 2 * 90 * 64 * 4)
    cache, read = step.cache("int8"), []
    plain = cache.read
    monkeypatch.setattr(cache, "read", lambda *asked: read.append(asked[2]) or plain(*asked))
    found = step.run(attention_kernel("sdpa"), cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert read == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_a_centre_takes_away_what_keys_have_in_common():
    """Keys as models have them: some channels far from 0 in all tokens, and a first key afar."""
    step = draw_step([(300, 100)], head_dim=64, block_size=16)
    generator = torch.Generator().manual_seed(1)
    mean = draw(generator, 2, 2, 64) * 8
    first = mean + draw(generator, 2, 2, 64) * 3
    for keys in (step.before[0], step.qkv[1]):
        keys += mean[1]
    step.before[0][0] = first[1]
    floats = step.run(ReferenceAttention, step.cache("float32"))
    centred = replace(step, key_centre=Int4Cache.find_centre(first, mean))
    plain, found = (
        (each.run(ReferenceAttention, each.cache("int4")) - floats).square().mean().sqrt()
        / floats.square().mean().sqrt()
        for each in (step, centred)
    )
    assert found < COST["int4"] < plain / 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_a_format(name, seed):
    step = draw_step([(300, 1), (200, 100)], head_dim=128, block_size=16, seed=seed)
    floats = step.run(ReferenceAttention, step.cache("float32"))
    found = step.run(ReferenceAttention, step.cache(name))
    cost = (found - floats).square().mean().sqrt() / floats.square().mean().sqrt()
    assert COST[name] / 3 < cost < COST[name]
