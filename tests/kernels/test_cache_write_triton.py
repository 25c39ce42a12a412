"""Turning and caching on CUDA in one launch, against `Rotation` and each cache's own `write`."""

from itertools import product

import pytest
import torch
from triton_cases import PLACES, mend_rounding, run_compiler, skip_unless_interpreted

from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape, FloatCache
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.kernels.registry import attention_kernel
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.rotary import Rotation

FORMATS = ["float32", "int8", "int4", "fp8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Query heads, key heads, their width: more than a program takes, shared ones, and an odd width.
SHAPES = [(6, 6, 32), (6, 2, 40), (4, 1, 128)]
SLOTS = [5, 20, 2, 11]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch):
    if request.param == "cpu":
        skip_unless_interpreted()
        mend_rounding(monkeypatch)
    return request.param


def config_of(heads, kv_heads, head_dim):
    return LanguageConfig(
        hidden_size=heads * head_dim, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=20,
        max_position_embeddings=128, rms_norm_eps=1e-6,
    )  # fmt: skip


def empty_cache(name, kv_heads, head_dim, dtype, *, device="cpu"):
    """Six blocks of four tokens in two layers, all zeros."""
    name = str(dtype).removeprefix("torch.") if name == "float32" else name
    shape = CacheShape(2, kv_heads, head_dim, 4)
    cache = CACHE_FORMATS[name].create(shape, 6, dtype=name, device=torch.device(device))
    for side in sides(cache):
        side.zero_()
    return cache


def sides(cache):
    if isinstance(cache, FloatCache):
        return cache.keys, cache.values
    return cache.numbers.view(torch.uint8), cache.scales


def draw_rows(generator, shape, dtype):
    heads, kv_heads, head_dim = shape
    return [
        torch.randn(len(SLOTS), count, head_dim, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


def as_one_product(device, *rows):
    """The same rows of heads as views of one tensor, as `Joint` gives them."""
    together = torch.cat([each.flatten(1) for each in rows], 1).to(device)
    parts = together.split([each[0].numel() for each in rows], 1)
    return [part.view(each.shape) for part, each in zip(parts, rows, strict=True)]


@pytest.mark.parametrize(("name", "dtype"), list(product(FORMATS, DTYPES)))
def test_what_is_turned_and_cached_is_torchs(device, name, dtype):
    """Exact here; a GPU may add a product before it rounds it."""
    from minigpt4_runtime.kernels.cache_write_triton import turn_and_write

    slots, positions = torch.tensor(SLOTS), torch.tensor([100, 0, 7, 63])
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        q, k, v = draw_rows(generator, shape, dtype)
        k[1, 0] = 0  # A scale of 0.
        wanted = empty_cache(name, *shape[1:], dtype)
        found = empty_cache(name, *shape[1:], dtype, device=device)
        if number % 2 and not isinstance(wanted, FloatCache):
            centre = torch.randn(2, *shape[1:], generator=generator)
            wanted.key_centre, found.key_centre = centre, centre.to(device)
        rotation = Rotation(positions, config_of(*shape), dtype)
        wanted.write(1, slots, rotation(k), v)
        there = Rotation(positions.to(device), config_of(*shape), dtype)
        turned = turn_and_write(found, 1, slots.to(device), *as_one_product(device, q, k, v), there)
        assert_as_near(turned, rotation(q), 4 * torch.finfo(dtype).eps, is_exact=device == "cpu")
        for ours, theirs in zip(
            found.read(1, slots.to(device)), wanted.read(1, slots), strict=True
        ):
            assert_as_near(ours, theirs, STEPS[name], is_exact=device == "cpu")
        for ours, theirs in zip(sides(found), sides(wanted), strict=True):
            assert torch.equal(ours[0].cpu(), theirs[0])  # The other layer.


# How far a number may be off where it was rounded to the other side, as a share of the largest.
STEPS = {"float32": 0.02, "int8": 1 / 127, "int4": 1 / 12, "fp8": 1 / 8}


def assert_as_near(found, wanted, step, *, is_exact):
    found = found.cpu()
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    bound = 1e-6 if is_exact else step
    assert ((found - wanted).abs() <= bound * wanted.abs().amax()).all()


@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # As the interpreter says.
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_head_without_numbers_leaves_others_alone(device, name, wrong):
    from minigpt4_runtime.kernels.cache_write_triton import turn_and_write

    shape = (2, 2, 32)
    q, k, v = draw_rows(torch.Generator().manual_seed(0), shape, torch.float32)
    k[2, 1, 4] = wrong
    cache = empty_cache(name, 2, 32, torch.float32, device=device)
    slots = torch.tensor(SLOTS, device=device)
    turn_and_write(cache, 0, slots, *(each.to(device) for each in (q, k, v)), None)
    keys, values = cache.read(0, slots)
    assert not keys[2, 1].isfinite().any()
    keys[2, 1] = 0
    assert keys.isfinite().all()
    assert values.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_it_waits_for_nothing_and_can_be_captured(name):
    from minigpt4_runtime.kernels.cache_write_triton import turn_and_write

    shape, slots = (6, 2, 40), torch.tensor(SLOTS, device="cuda")
    rows = draw_rows(torch.Generator().manual_seed(0), shape, torch.float16)
    rows = [each.cuda() for each in rows]
    rotation = Rotation(torch.arange(len(SLOTS), device="cuda"), config_of(*shape), torch.float16)
    caches = [empty_cache(name, 2, 40, torch.float16, device="cuda") for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = turn_and_write(caches[0], 1, slots, *rows, rotation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = turn_and_write(caches[1], 1, slots, *rows, rotation)
    graph.replay()
    assert torch.equal(found, wanted)
    for ours, theirs in zip(sides(caches[1]), sides(caches[0]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_turns_in_its_cache_as_it_does_beside_it(device):
    """The same hidden rows from Triton's attention, which turns itself, and from torch's."""
    from step_batches import Cached, batch_of

    config = config_of(4, 2, 16)
    generator = torch.Generator().manual_seed(3)
    llama = Llama(config).requires_grad_(False)
    for weight in llama.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    embeddings = torch.randn(5, 64, generator=generator)
    batch = batch_of([Cached(0, 5, 5, (1, 3))], 4, device)
    found = []
    for kernel in ("triton", "sdpa"):
        cache = empty_cache("int8", 2, 16, torch.float32, device=device)
        attend = attention_kernel(kernel)(cache)(batch)
        rows, positions = embeddings.to(device), torch.arange(5, device=device)
        found.append(llama.to(device)(rows, positions, attend))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


COMPILE = """
from types import SimpleNamespace
from minigpt4_runtime.kernels.cache_write_triton import _turn_and_write

# What rows are of, what the cache has, the GPU, the width of heads, whether keys have a centre.
for rows, cached, capability, width, has_centre in (
    ("fp16", "fp16", 80, 88, False), ("fp16", "i8", 80, 128, False),
    ("bf16", "u8", 90, 128, True),
    ("fp16", "fp8e4nv", 89, 128, False),
):
    has_scales, is_int4 = cached in {"i8", "fp8e4nv"}, cached == "u8"
    scales = "*fp32" if has_scales else "*i8" if is_int4 else f"*{cached}"
    types = dict.fromkeys(("q", "k", "v", "cos", "sin", "turned"), f"*{rows}") | {
        "slots": "*i64", "keys": f"*{cached}", "values": f"*{cached}", "key_scales": scales,
        "value_scales": scales, "centre": "*fp32", "num_heads": "i32",
        "q_step": "i32", "k_step": "i32", "v_step": "i32",
    }
    sizes = {
        "HEADS": 4, "GROUP": 1, "HEAD_DIM": width, "DIMS": 128, "HAS_SCALES": has_scales,
        "INT4_GROUP": 8 if is_int4 else 0,
    }
    if not has_centre:
        sizes["centre"] = None
    for absent in ((), ("cos", "sin")) if cached == "fp16" else ((),):
        compile_for(capability, _turn_and_write, types, sizes | dict.fromkeys(absent))
"""


def test_triton_compiles_it_for_gpus(tmp_path):
    run_compiler(COMPILE, tmp_path)
