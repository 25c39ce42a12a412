"""The contract of attention kernels: each against the reference, and that against torch's own.

A step is drawn at random in float32 on the CPU, in values that the kernel's dtype holds exactly,
and every slot that no sequence has filled is NaN: a kernel that reads one shows it.
"""

import sys
import types
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from step_batches import Cached, batch_of, draw, lay_out, slots_before
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import mend_rounding, need_fewer_programs, run_compiler, skip_unless_interpreted

from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.devices.cuda import CudaBackend
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.kernels.attention_reference import ReferenceAttention
from minigpt4_runtime.kernels.contracts import AttentionKernel
from minigpt4_runtime.kernels.registry import (
    ATTENTION_KERNELS,
    attention_kernel,
    bind_attention,
)

# How far from the float32 reference a kernel may be in each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# A kernel's device, and its dtype where a test asks for none. On a GPU each dtype is another
# kernel; the NPU's operator takes only halves.
ON_A_GPU = [("cuda", dtype) for dtype in TOLERANCE]
HELD_TO_THE_REFERENCE = {
    "reference": [("cpu", torch.float32), *ON_A_GPU],
    "sdpa": [("cpu", torch.float32), *ON_A_GPU],
    "triton": [("cpu", torch.float32), *ON_A_GPU],
    "npu": [("cpu", torch.float16), ("npu", torch.float16)],
    "native": [("cpu", torch.float32)],
}
MARKS = {"cpu": (), "cuda": pytest.mark.gpu, "npu": pytest.mark.npu}

LAYERS = 3
HEADS = [(4, 4), (4, 2), (6, 1)]
HEAD_DIMS = [6, 40, 128]
SHAPES = list(product(HEADS, HEAD_DIMS))
BLOCK_SIZES = [1, 4, 16]
# Of their product, what Triton's interpreter is given: each two of them meet.
INTERPRETED = {
    (HEADS[i], HEAD_DIMS[j], BLOCK_SIZES[(i + j) % 3]) for i, j in product(range(3), range(3))
}
# (num_tokens, num_rows): two that decode, a first token, a chunk of a prompt and a whole one.
RAGGED = [(37, 1), (20, 7), (1, 1), (6, 6), (16, 1)]


@dataclass(frozen=True)
class Kernel:
    name: str
    bind: type[AttentionKernel]
    device: str
    dtype: torch.dtype


def show_case(name, device, dtype) -> str:
    return f"{name}-{device}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(
    params=[
        pytest.param((name, *case), id=show_case(name, *case), marks=MARKS[case[0]])
        for name, cases in HELD_TO_THE_REFERENCE.items()
        for case in cases
    ]
)
def kernel(request, monkeypatch) -> Kernel:
    name, device, dtype = request.param
    if (name, device) == ("triton", "cpu"):
        skip_unless_interpreted()
        mend_rounding(monkeypatch)
        need_fewer_programs(monkeypatch)
    if name == "native":
        pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
    if (name, device) == ("npu", "cpu"):
        monkeypatch.setitem(sys.modules, "torch_npu", stand_in_for_torch_npu())
    return Kernel(name, attention_kernel(name), device, dtype)


def stand_in_for_torch_npu(chip=220):
    """What the NPU's kernel uses of torch_npu, as documented, computed by the reference."""
    module = types.ModuleType("torch_npu")
    module.npu = types.SimpleNamespace(get_soc_version=lambda: chip)
    module.num_calls = 0

    def npu_fused_infer_attention_score(
        query, key, value, *, actual_seq_lengths_kv, block_table, num_heads, scale, input_layout,
        num_key_value_heads, block_size,
    ):  # fmt: skip
        module.num_calls += 1
        count, one, width = query.shape
        head_dim = width // num_heads
        assert (one, input_layout, scale) == (1, "BSH", pytest.approx(head_dim**-0.5))
        assert all(x.is_contiguous() for x in (query, key, value))
        assert key.shape[1:] == (block_size, num_key_value_heads * head_dim)
        assert block_size % 16 == 0
        assert block_table.dtype is torch.int32
        assert [type(length) for length in actual_seq_lengths_kv] == [int] * count
        shape = (1, *key.shape[:2], num_key_value_heads, head_dim)
        cache = FloatCache(key.reshape(shape).clone(), value.reshape(shape).clone())
        batch = batch_of(
            [
                Cached(row, 1, length, tuple(block_table[row].tolist()))
                for row, length in enumerate(actual_seq_lengths_kv)
            ],
            block_size,
        )
        k, v = cache.read(0, batch.slots)
        q = query.view(count, num_heads, head_dim)
        attended = ReferenceAttention(cache)(batch)(0, q, k, v)
        return attended.view_as(query), torch.zeros(1)

    module.npu_fused_infer_attention_score = npu_fused_infer_attention_score
    return module


def is_interpreted(kernel: Kernel) -> bool:
    return (kernel.name, kernel.device) == ("triton", "cpu")


@dataclass(frozen=True)
class Step:
    """A step that is to be run, and the cache before it."""

    cache: FloatCache
    sequences: list[Cached]
    qkv: tuple[tuple[Tensor, Tensor, Tensor], ...]  # For each layer.

    def run(self, kernel: Kernel, layers=range(LAYERS)) -> tuple[list[Tensor], FloatCache]:
        """What the kernel gives for these layers, and the cache after them: in float32, here."""
        place = {"device": kernel.device, "dtype": kernel.dtype}
        cache = FloatCache(*(side.clone().to(**place) for side in both(self.cache)))
        if not kernel.bind.limits.takes(cache):
            pytest.skip(f"{kernel.name} takes no cache of this shape")
        batch = batch_of(self.sequences, cache.shape.block_size, kernel.device)
        attend = kernel.bind(cache)(batch)
        outputs = [attend(layer, *(x.to(**place) for x in self.qkv[layer])) for layer in layers]
        after = FloatCache(*(side.float().cpu() for side in both(cache)))
        return [output.float().cpu() for output in outputs], after


REFERENCE = Kernel("reference", ReferenceAttention, "cpu", torch.float32)


def both(cache: FloatCache) -> tuple[Tensor, Tensor]:
    return cache.keys, cache.values


def draw_step(lengths, *, heads=(4, 2), head_dim=8, block_size=4, dtype=torch.float32) -> Step:
    generator = torch.Generator().manual_seed(sum(heads) + head_dim + block_size)
    sequences = lay_out(lengths, block_size, generator)
    num_blocks = max(max(each.blocks) for each in sequences) + 2
    num_rows = sum(each.num_rows for each in sequences)
    slots = slots_before(sequences, block_size)
    sides = []
    for _ in range(2):
        side = torch.full((LAYERS, num_blocks * block_size, heads[1], head_dim), float("nan"))
        side[:, slots] = draw(generator, LAYERS, len(slots), heads[1], head_dim, dtype=dtype)
        sides.append(side.unflatten(1, (num_blocks, block_size)))
    qkv = tuple(
        tuple(
            draw(generator, num_rows, count, head_dim, dtype=dtype) for count in (*heads, heads[1])
        )
        for _ in range(LAYERS)
    )
    return Step(FloatCache(*sides), sequences, qkv)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=0)


def assert_same(actual: FloatCache, expected: FloatCache) -> None:
    for ours, theirs in zip(both(actual), both(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


def dense(q, k, v):
    """torch's causal attention over one whole sequence."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    repeats = len(q) // len(k)
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


def test_every_kernel_is_held_to_the_reference():
    assert set(HELD_TO_THE_REFERENCE) == set(ATTENTION_KERNELS)


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_the_reference_is_torchs_own_attention(heads, head_dim):
    step = draw_step([(23, 23)], heads=heads, head_dim=head_dim)
    outputs, _ = step.run(REFERENCE)
    for output, qkv in zip(outputs, step.qkv, strict=True):
        assert_close(output, dense(*qkv), torch.float32)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_a_ragged_step_is_the_references(kernel, heads, head_dim, block_size):
    """Also: what it writes is the same, and it writes nothing else, least of all other layers."""
    if is_interpreted(kernel) and (heads, head_dim, block_size) not in INTERPRETED:
        pytest.skip("Triton's interpreter is given each two of them")
    step = draw_step(
        RAGGED, heads=heads, head_dim=head_dim, block_size=block_size, dtype=kernel.dtype
    )
    (output,), cache = step.run(kernel, layers=[1])
    (expected,), expected_cache = step.run(REFERENCE, layers=[1])
    assert_close(output, expected, kernel.dtype)
    assert_same(cache, expected_cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_within_their_tolerance(kernel, dtype):
    if is_interpreted(kernel) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if they were integers")
    step = draw_step(RAGGED, head_dim=128, block_size=16, dtype=dtype)
    outputs, _ = step.run(Kernel(kernel.name, kernel.bind, kernel.device, dtype))
    expected, _ = step.run(REFERENCE)
    assert_close(torch.stack(outputs), torch.stack(expected), dtype)


@pytest.mark.parametrize("lengths", [[(9, 1), (30, 1)], [(9, 9), (30, 4)], RAGGED])
def test_one_preparation_serves_all_layers(kernel, lengths):
    step = draw_step(lengths, head_dim=16, block_size=16, dtype=kernel.dtype)
    outputs, cache = step.run(kernel)
    expected, expected_cache = step.run(REFERENCE)
    assert_close(torch.stack(outputs), torch.stack(expected), kernel.dtype)
    assert_same(cache, expected_cache)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[(700, 1), (3, 1)], [(3, 1), (330, 12), (300, 1), (7, 7)]])
def test_long_contexts_of_few_sequences(kernel, heads, lengths):
    """Here a kernel may cut contexts into shares, some of which hold nothing that a row sees."""
    step = draw_step(lengths, heads=heads, block_size=16, dtype=kernel.dtype)
    outputs, _ = step.run(kernel, layers=[0])
    expected, _ = step.run(REFERENCE, layers=[0])
    assert_close(outputs[0], expected[0], kernel.dtype)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_capturable_step_serves_other_numbers_at_the_same_addresses(kernel, count):
    """What was prepared for short contexts attends to long ones, as a replayed graph does."""
    if not kernel.bind.is_capturable:
        pytest.skip(f"{kernel.name} prepares each step anew")
    block_size, dtype = 16, kernel.dtype
    before = draw_step([(2, 1)] * count, block_size=block_size, dtype=dtype)
    longest = 900 if count < 40 else 90
    lengths = [(1 + 97 * i % longest, 1) for i in range(count, 0, -1)]
    after = draw_step(lengths, block_size=block_size, dtype=dtype)
    place = {"device": kernel.device, "dtype": dtype}
    cache = FloatCache(*(side.clone().to(**place) for side in both(after.cache)))
    table = torch.zeros(count, 64, dtype=torch.int32, device=kernel.device)
    batch = replace(batch_of(before.sequences, block_size, kernel.device), block_table=table)
    attend = kernel.bind(cache)(batch)
    new = batch_of(after.sequences, block_size, kernel.device)
    table[:, : new.block_table.shape[1]] = new.block_table.flip(0)
    for name in ("slots", "lengths"):
        getattr(batch, name).copy_(getattr(new, name))
    batch.table_rows.copy_(new.table_rows.flip(0))
    output = attend(0, *(x.to(**place) for x in after.qkv[0]))
    (expected,), _ = after.run(REFERENCE, layers=[0])
    assert_close(output.float().cpu(), expected, dtype)


@pytest.mark.gpu
def test_a_captured_step_is_replayed_with_other_numbers():
    """By torch's CUDA graph itself."""
    step, other = (draw_step(lengths, block_size=16) for lengths in ([(9, 1)], [(700, 1)]))
    cache = FloatCache(*(side.clone().cuda() for side in both(other.cache)))
    batch, new = (batch_of(each.sequences, 16, "cuda") for each in (step, other))
    batch = replace(batch, block_table=torch.zeros_like(new.block_table))
    q, k, v = (x.cuda() for x in step.qkv[0])
    attend = attention_kernel("triton")(cache)(batch)
    attend(0, q, k, v)  # Compiled before it is captured.
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        output = attend(0, q, k, v)
    for name in ("slots", "lengths", "table_rows", "block_table"):
        getattr(batch, name).copy_(getattr(new, name))
    for there, given in zip((q, k, v), other.qkv[0], strict=True):
        there.copy_(given)
    # What was compiled first has written its own key among the others.
    for there, given in zip(both(cache), both(other.cache), strict=True):
        there.copy_(given)
    graph.replay()
    (expected,), _ = other.run(REFERENCE, layers=[0])
    assert_close(output.cpu(), expected, torch.float32)


@pytest.mark.parametrize("num_rows", [1, 5, 100])
def test_paged_equals_contiguous(kernel, num_rows):
    # Two sequences of the same length: the first is scattered, the second lies in one run.
    step = draw_step([(100, num_rows)] * 2, head_dim=16, block_size=16, dtype=kernel.dtype)
    scattered, contiguous = (each.blocks for each in step.sequences)
    assert sorted(contiguous) == list(contiguous)
    assert sorted(scattered) != list(scattered)
    for side in both(step.cache):
        side[:, list(scattered)] = side[:, list(contiguous)]
    for x in (x for qkv in step.qkv for x in qkv):
        x[:num_rows] = x[num_rows:]
    (output,), _ = step.run(kernel, layers=[1])
    assert_close(output[:num_rows], output[num_rows:], kernel.dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_chunked_equals_whole(kernel, heads):
    """Prompts come in chunks of one to four tokens, several sequences in a step."""
    block_size = max(4, kernel.bind.limits.block_size_step)
    lengths, dtype = [(7, 7), (1, 1), (18, 18)], kernel.dtype
    whole = draw_step(lengths, heads=heads, head_dim=16, block_size=block_size, dtype=dtype)
    (q, k, v), sequences = whole.qkv[0], whole.sequences
    place = {"device": kernel.device, "dtype": kernel.dtype}
    cache = FloatCache(*(side.to(**place) for side in both(whole.cache)))
    bound = kernel.bind(cache)
    generator = torch.Generator().manual_seed(sum(heads))
    done, outputs = [0] * len(sequences), torch.empty_like(q)
    while sum(done) < len(q):
        slices, rows = [], []
        for index, each in enumerate(sequences):
            drawn = int(torch.randint(1, 5, (), generator=generator))
            count = min(drawn, each.num_tokens - done[index])
            if count:
                start = each.first_row + done[index]
                done[index] += count
                slices.append(Cached(len(rows), count, done[index], each.blocks))
                rows += range(start, start + count)
        attend = bound(batch_of(slices, cache.shape.block_size, kernel.device))
        outputs[rows] = attend(0, *(x[rows].to(**place) for x in (q, k, v))).float().cpu()
    for each in sequences:
        rows = slice(each.first_row, each.first_row + each.num_rows)
        assert_close(outputs[rows], dense(q[rows], k[rows], v[rows]), kernel.dtype)


def test_a_batch_equals_its_sequences_alone(kernel):
    step = draw_step(RAGGED, head_dim=16, block_size=16, dtype=kernel.dtype)
    (together,), _ = step.run(kernel, layers=[0])
    for each in step.sequences:
        rows = slice(each.first_row, each.first_row + each.num_rows)
        alone = Cached(0, each.num_rows, each.num_tokens, each.blocks)
        qkv = tuple(tuple(x[rows] for x in layer) for layer in step.qkv)
        (output,), _ = Step(step.cache, [alone], qkv).run(kernel, layers=[0])
        assert_close(together[rows], output, kernel.dtype)


class WidestTensor(TorchDispatchMode):
    """Notes the most keys that any tensor made for 100 rows has a column for."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, Tensor) and each.ndim > 1 and each.shape[-2] == 100:
                self.most = max(self.most, each.shape[-1])
        return made


@pytest.mark.parametrize("heads", HEADS)
def test_a_chunk_of_a_prompt_makes_no_mask_of_its_context_on_a_cpu(heads):
    step = draw_step([(900, 100)], heads=heads)
    with WidestTensor() as widest:
        step.run(Kernel("sdpa", attention_kernel("sdpa"), "cpu", torch.float32), layers=[0])
    assert 0 < widest.most <= 100


@pytest.mark.parametrize(
    ("chip", "dtype", "block_size", "head_dim", "num_calls"),
    [
        (220, torch.float16, 16, 128, LAYERS),
        (250, torch.bfloat16, 128, 16, LAYERS),
        # The operator is not documented for this chip: it goes through torch's attention.
        (202, torch.float16, 16, 128, 0),
    ],
)
def test_the_npu_decodes_by_its_operator(monkeypatch, chip, dtype, block_size, head_dim, num_calls):
    torch_npu = stand_in_for_torch_npu(chip)
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    kernel = Kernel("npu", attention_kernel("npu"), "cpu", dtype)
    step = draw_step(RAGGED, head_dim=head_dim, block_size=block_size, dtype=dtype)
    outputs, _ = step.run(kernel)
    expected, _ = step.run(REFERENCE)
    assert_close(torch.stack(outputs), torch.stack(expected), dtype)
    assert torch_npu.num_calls == num_calls


@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"),
    [(torch.float32, 16, 128), (torch.float16, 4, 128), (torch.float16, 16, 40)],
)
def test_the_first_kernel_that_takes_a_cache_is_bound(monkeypatch, dtype, block_size, head_dim):
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in_for_torch_npu())
    sides = (torch.zeros(1, 2, block_size, 2, head_dim, dtype=dtype) for _ in range(2))
    cache = FloatCache(*sides)
    assert isinstance(bind_attention(("npu", "sdpa"), cache), attention_kernel("sdpa"))
    with pytest.raises(
        BackendUnavailableError, match=f"npu.*of {str(dtype)[6:]}.*{block_size} tok"
    ):
        bind_attention(("npu",), cache)
    sides = (torch.zeros(1, 2, 16, 2, 64, dtype=torch.float16) for _ in range(2))
    assert isinstance(bind_attention(("npu", "sdpa"), FloatCache(*sides)), attention_kernel("npu"))


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_another_dtype_than_the_model(kernel, cache_dtype):
    """What is kept in halves is read as what the queries are."""
    if kernel.name == "npu" or is_interpreted(kernel):
        pytest.skip("takes one dtype for both, or an interpreter that cannot widen bfloat16")
    step = draw_step(RAGGED, head_dim=16, block_size=16, dtype=cache_dtype)
    halves = FloatCache(*(side.to(kernel.device, cache_dtype) for side in both(step.cache)))
    attend = kernel.bind(halves)(batch_of(step.sequences, 16, kernel.device))
    output = attend(0, *(x.to(kernel.device, kernel.dtype) for x in step.qkv[0]))
    (expected, *_), _ = step.run(REFERENCE)
    assert output.dtype == kernel.dtype
    assert_close(output.float().cpu(), expected, kernel.dtype)


COMPILE = """
import torch
from minigpt4_runtime.cache.key_value import CacheShape
from minigpt4_runtime.kernels.attention_triton import _attend_tile, _join_shares, _sizes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What queries are of, what keys are of, the GPU, the query heads of a key head, rows that decode,
# and whether contexts are cut into shares.
for dtype, cached, capability, group, is_decode, is_shared in (
    ("fp16", "fp16", 80, 1, False, False), ("bf16", "bf16", 90, 4, False, True),
    ("fp32", "fp32", 80, 1, False, False), ("fp16", "i8", 80, 6, False, True),
    ("bf16", "fp8e4nv", 90, 1, False, False),
    ("fp16", "fp16", 80, 1, True, True), ("bf16", "bf16", 90, 6, True, False),
    ("fp16", "i8", 80, 1, True, False), ("bf16", "fp8e4nv", 90, 1, True, True),
    ("fp16", "u8", 80, 1, False, False), ("bf16", "u8", 90, 6, True, True),
):
    sizes = _sizes(CacheShape(1, 32, 128, 16), group, DTYPES[dtype], is_decode=is_decode)
    has_scales, is_int4 = cached in {"i8", "fp8e4nv"}, cached == "u8"
    scales = "*fp32" if has_scales else "*i8" if is_int4 else f"*{cached}"
    signature = dict.fromkeys(_attend_tile.arg_names, f"*{dtype}") | {
        "keys": f"*{cached}", "values": f"*{cached}", "key_scales": scales, "value_scales": scales,
        "tiles": "*i64" if is_decode else "*i32", "table_rows": "*i64", "table": "*i32",
        "table_width": "i32", "scale": "fp32", "log_totals": "*fp32",
    }
    signature["mixed"] = "*fp32" if is_shared else f"*{dtype}"
    flags = {
        "HAS_SCALES": has_scales, "INT4_GROUP": 8 if is_int4 else 0, "IS_SHARED": is_shared,
    }
    # As it is launched: with tensors that begin at multiples of 16 bytes.
    tensors = [name for name, kind in signature.items() if kind.startswith("*")]
    launch = {"num_warps": 4 if is_decode else 8, "num_stages": 3}
    compiled = compile_for(
        capability, _attend_tile, signature, sizes | flags | launch, divisible=tensors
    )
    # The least that a multiprocessor of capability 8.6 or 8.9 has for one program.
    assert compiled.metadata.shared <= 99 * 1024, compiled.metadata.shared
    if dtype != "fp32":
        is_fast = any(name in compiled.asm["ptx"] for name in ("mma.sync", "wgmma.mma_async"))
        assert is_fast, "the products are not made by tensor cores"
    signature = {
        "mixed": "*fp32", "log_totals": "*fp32", "attended": f"*{dtype}", "num_shares": "i32",
        "head_dim": "i32",
    }
    compile_for(capability, _join_shares, signature, {"DIMS": 128, "SHARES": 16})
"""


def test_triton_compiles_its_kernel_for_gpus(tmp_path):
    run_compiler(COMPILE, tmp_path)


@pytest.mark.parametrize(
    ("capability", "triton", "compiler", "attention"),
    [
        ((8, 0), True, "/usr/bin/gcc", ("triton", "sdpa")),
        ((7, 5), True, "/usr/bin/gcc", ("sdpa",)),
        ((9, 0), False, "/usr/bin/gcc", ("sdpa",)),
        ((9, 0), True, None, ("sdpa",)),
    ],
)
def test_cuda_takes_triton_where_it_runs(monkeypatch, capability, triton, compiler, attention):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    optional = "minigpt4_runtime.optional"
    monkeypatch.setattr(f"{optional}.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(f"{optional}.shutil.which", lambda name: compiler)
    monkeypatch.setattr(f"{optional}.Path.is_file", lambda path: path.name == "Python.h")
    assert CudaBackend().facts.attention == attention
