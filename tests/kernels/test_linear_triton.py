"""Products on CUDA: Triton's kernels against the formats' own products, which define correct."""

from functools import partial
from pkgutil import resolve_name

import pytest
import torch
from triton_cases import PLACES, mend_rounding, run_compiler, skip_unless_interpreted

from minigpt4_runtime.formats.contracts import InOrder
from minigpt4_runtime.formats.registry import weight_format
from minigpt4_runtime.kernels.registry import LINEAR_KERNELS, linear_kernel

CUDA = torch.device("cuda")
NAMES = [
    "float", "w8a16", "w8a8", "w8a16-g32-asymmetric", "w8a8-asymmetric", "w4a16-g32",
    "w4a16-g128-asymmetric", "w4a8-g64", "w8a16-sparse24", "w8a8-sparse24", "w8a8-fp8",
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# As shares of the size of a sum: of rounding a weight's numbers, and sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
# Here a few are so many, so that the interpreter has less to do: then 20 rows are many.
FEW_ROWS = 18


@pytest.fixture(params=PLACES)
def device(request, monkeypatch):
    if request.param == "cpu":
        skip_unless_interpreted()
        mend_rounding(monkeypatch)
        for each in (triton_products(), linear_float8()):
            monkeypatch.setattr(each, "FEW_ROWS", FEW_ROWS)
    return request.param


def triton_products():
    pytest.importorskip("triton", reason="triton is not installed")
    from minigpt4_runtime.kernels import linear_triton

    return linear_triton


def linear_float8():
    from minigpt4_runtime.kernels import linear_float8

    return linear_float8


def kernel_for(chosen):
    triton_products()
    kernel = resolve_name(LINEAR_KERNELS[chosen.family, "cuda"])(None)
    # Parts keep their order; see test_sparse_products_are_those_of_torch_where_these_are_faster.
    return (
        kernel.arrange(chosen.pack(torch.ones(8, 8)))[1] if isinstance(kernel, InOrder) else kernel
    )


def draw_case(name, num_rows, dtype, *, seed, num_outputs=80, num_inputs=384):
    """The format, rows, parts, bias, and what the format itself makes of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = weight_format(name)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    parts = chosen.pack(weight.to(dtype) if name == "float" else weight)
    rows = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype) if seed % 2 else None
    return chosen, rows, parts, bias, chosen.multiply(rows.float(), parts, bias)


def skip_without_float8(device, name):
    if (device, name) == ("cuda", "w8a8-fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")


def moved(parts, device):
    return {name: part.to(device) for name, part in parts.items()}


def assert_close(found, wanted, dtype, rows, tolerance=None):
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    size = wanted.abs() + rows.float().norm(dim=-1, keepdim=True)
    assert ((found.float().cpu() - wanted).abs() <= (tolerance or TOLERANCE[dtype]) * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_the_formats(device, name, num_rows, dtype):
    """One row, a few, and so many that the weight is widened or the sums are whole."""
    if (device, dtype) == ("cpu", torch.bfloat16) and num_rows > 1:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if they were integers")
    skip_without_float8(device, name)
    chosen, rows, parts, bias, wanted = draw_case(name, num_rows, dtype, seed=num_rows)
    bias = None if bias is None else bias.to(device)
    found = kernel_for(chosen)(rows.to(device), moved(parts, device), bias)
    assert_close(found, wanted, dtype, rows)


@pytest.mark.parametrize(
    ("name", "num_outputs", "num_inputs"),
    [
        ("float", 1, 1), ("float", 35, 1030), ("w8a16", 1, 1), ("w8a16", 33, 1030),
        ("w8a8", 35, 11), ("w8a8-asymmetric", 3, 2050),
        ("w8a16-g32-asymmetric", 5, 1056), ("w4a16-g32", 9, 2080), ("w4a16-g64", 1, 64),
        ("w4a8-g128-asymmetric", 40, 2176), ("w8a16-sparse24", 7, 1048), ("w8a8-sparse24", 8, 8),
        ("w8a8-fp8", 32, 1040), ("w8a8-fp8", 5, 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_rows", [0, 1, 2, 20])
def test_any_sizes(device, name, num_outputs, num_inputs, num_rows):
    """No tile is full, and of the last ones most is not there."""
    sizes = {"num_outputs": num_outputs, "num_inputs": num_inputs}
    chosen, rows, parts, _, wanted = draw_case(name, num_rows, torch.float32, seed=0, **sizes)
    found = kernel_for(chosen)(rows.to(device)[None], moved(parts, device), None)
    assert_close(found, wanted[None], torch.float32, rows[None])


@pytest.mark.parametrize("num_rows", [64, 65, 128])
def test_more_rows_than_a_program_takes(device, monkeypatch, num_rows):
    monkeypatch.setattr(triton_products(), "FEW_ROWS", 128)
    chosen, rows, parts, _, wanted = draw_case("w4a16-g32", num_rows, torch.float32, seed=0)
    found = kernel_for(chosen)(rows.to(device), moved(parts, device), None)
    assert_close(found, wanted, torch.float32, rows)


@pytest.mark.parametrize("num_rows", [3, 20])
@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "w8a16-sparse24", "w8a8-fp8"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # As the interpreter says.
def test_a_row_without_numbers_leaves_others_alone(device, name, num_rows, wrong):
    chosen, rows, parts, _, wanted = draw_case(name, num_rows, torch.float32, seed=0)
    rows[1, 40] = wrong
    found = kernel_for(chosen)(rows.to(device), moved(parts, device), None).cpu()
    assert not found[1].isfinite().any()
    others = [0, *range(2, num_rows)]
    assert_close(found[others], wanted[others], torch.float32, rows[others])


def test_many_rows_of_8_bits_are_summed_as_whole_numbers(device, monkeypatch):
    """By torch where all of a row has one scale, also of a 2:4 weight, if it takes the sizes.

    By Triton elsewhere, but for groups of 32.
    """
    calls = []
    by_torch, by_triton = torch._int_mm, triton_products().multiply_whole

    def count(way, multiply, rows, *more):
        assert rows.dtype is torch.int8
        calls.append(way)
        return multiply(rows, *more)

    monkeypatch.setattr(torch, "_int_mm", partial(count, "torch", by_torch))
    triton = partial(count, "Triton", by_triton)
    monkeypatch.setattr(triton_products(), "multiply_whole", triton)
    monkeypatch.setattr(triton_products(), "FEW_ROWS", FEW_ROWS)
    cases = [
        ("w8a8", 72, "torch"), ("w8a8-sparse24", 72, "torch"),
        ("w8a8-sparse24", 71, "Triton"), ("w8a8-asymmetric", 72, None),
        ("w8a8-g64", 72, "Triton"), ("w8a8-g128-asymmetric", 72, None),
        ("w4a8-g64-asymmetric", 72, "Triton"),
        ("w8a8-g32", 72, None), ("w4a8-g32", 72, None), ("w8a16", 72, None),
    ]  # fmt: skip
    for name, num_outputs, way in cases:
        calls.clear()
        chosen, rows, parts, bias, wanted = draw_case(
            name, 20, torch.float16, seed=1, num_outputs=num_outputs
        )
        found = kernel_for(chosen)(rows.to(device), moved(parts, device), bias.to(device))
        assert calls == [way] * (way is not None)
        # Whole sums are exact: nothing is rounded but the result.
        assert_close(found, wanted, torch.float16, rows, 1e-3 if way else None)


@pytest.mark.parametrize(
    ("name", "times", "sparse_from"),
    [
        ("w8a16-sparse24", (9.0, 8.0), 32), ("w8a8-sparse24", (9.0, 8.0), 32),
        ("w8a8-sparse24", (1.0, 0.97, 9.0, 8.0), 64), ("w8a16-sparse24", (1.0, 1, 1, 1.1), None),
        ("w8a16-sparse24", (), None),
    ],
)  # fmt: skip
def test_sparse_products_are_those_of_torch_where_these_are_faster(
    device, monkeypatch, name, times, sparse_from
):
    """Against stand-ins that demand what cuSPARSELt does: what it computes is the plain product."""
    if device == "cuda":
        pytest.skip("there torch has its own")
    from minigpt4_runtime.kernels import linear_sparse

    monkeypatch.setattr(linear_sparse, "_MEASURED_ROWS", (32, 64))
    made = []

    def compress(matrix):
        assert not any(size % 32 for size in matrix.shape)
        assert matrix.is_contiguous()
        assert (matrix.view(-1, 4) != 0).sum(1).max() <= 2
        return matrix

    def multiply(kept, rows, *, out_dtype, transpose_result):
        assert not any(size % 16 for size in rows.shape)
        assert rows.T.is_contiguous(), "of bytes it takes the other order alone"
        made.append(rows.shape[1])
        wide = rows.T.double() @ kept.double().T
        assert transpose_result
        return wide.to(out_dtype or rows.dtype)

    clock = iter(times)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: bool(times))
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(linear_sparse, "_has_sparse_cores", lambda device: True)
    monkeypatch.setattr(linear_sparse, "seconds_of", lambda work, device: (work(), next(clock))[1])
    linear_sparse.least_rows.cache_clear()
    chosen, rows, parts, bias, wanted = draw_case(
        name, 37, torch.float16, seed=1, num_outputs=96, num_inputs=64
    )
    parts, kernel = resolve_name(LINEAR_KERNELS[chosen.family, "cuda"])(None).arrange(parts)
    linear_sparse.least_rows.cache_clear()
    assert kernel.keywords == {"sparse_from": sparse_from}
    made.clear()
    assert_close(kernel(rows, parts, bias), wanted, torch.float16, rows, 2e-3)
    assert made == [48] * (sparse_from == 32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_a_sparse_product_that_is_wrong_is_never_taken(monkeypatch, caplog, dtype):
    """Torch's operators have no public name: here they keep their promise but for one number."""
    from minigpt4_runtime.kernels import linear_sparse

    def multiply(kept, rows, *, out_dtype, transpose_result):
        made = (rows.T.double() @ kept.double().T).to(out_dtype or rows.dtype)
        made[-1, -1] += wrong
        return made

    clock = iter([9.0, 1.0] * 2)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda matrix: matrix)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(linear_sparse, "_has_sparse_cores", lambda device: True)
    monkeypatch.setattr(linear_sparse, "seconds_of", lambda work, device: next(clock))
    for wrong, wanted in ((0, 512), (1, None)):
        linear_sparse.least_rows.cache_clear()
        assert linear_sparse.least_rows((64, 96), dtype, torch.device("cpu")) == wanted
        assert ("is wrong here" in caplog.text) == bool(wrong)
    linear_sparse.least_rows.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_a_gpu_s_own_sparse_products_are_the_plain_ones_and_can_be_captured(dtype):
    """Random whole numbers, whose sums are exact: no number may differ."""
    from minigpt4_runtime.kernels import linear_sparse

    if not torch.backends.cusparselt.is_available() or not linear_sparse._has_sparse_cores(CUDA):
        pytest.skip("this GPU or this torch has no 2:4 sparse products")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(-1, 2, (96, 256), generator=generator).to(dtype).cuda()
    for start, (first, second) in enumerate(((0, 1), (0, 3), (1, 2), (2, 3))):
        matrix[start::4].unflatten(1, (-1, 4))[..., [first, second]] = 0
    rows = torch.randint(-1, 2, (37, 256), generator=generator).to(dtype).cuda()
    wanted = rows.double() @ matrix.double().T
    assert linear_sparse.multiply_sparse(rows, matrix).double().equal(wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_sparse.multiply_sparse(rows, matrix)
    graph.replay()
    assert captured.double().equal(wanted)


def test_8_bit_floats_are_multiplied_as_such(device, monkeypatch):
    """Many rows by torch, if it takes the sizes, and a few in registers, whatever the sizes are.

    Both are exact up to the sum, and so closer to the format than what is rounded to 16 bits first.
    """
    skip_without_float8(device, "w8a8-fp8")
    calls, multiply = [], torch._scaled_mm

    def count(rows, matrix, **more):
        calls.append((rows.dtype, *rows.shape))
        return multiply(rows, matrix, **more)

    monkeypatch.setattr(torch, "_scaled_mm", count)
    monkeypatch.setattr(linear_float8(), "FEW_ROWS", FEW_ROWS)
    for num_rows in (1, 3, 20):
        for num_outputs in (64, 72):
            chosen, rows, parts, bias, wanted = draw_case(
                "w8a8-fp8", num_rows, torch.float16, seed=1, num_outputs=num_outputs
            )
            parts["weight"].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)  # Every number.
            parts["weight"][parts["weight"] & 127 == 127] = 0  # But what is none.
            wanted = chosen.multiply(rows.float(), parts, bias)
            found = kernel_for(chosen)(rows.to(device), moved(parts, device), bias.to(device))
            assert_close(found, wanted, torch.float16, rows, 1e-3)
    assert calls == [(torch.float8_e4m3fn, 20, 384)]


def test_rows_are_rounded_as_the_formats_do(device):
    from minigpt4_runtime.formats import rounding
    from minigpt4_runtime.kernels import rounding_triton

    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    for group_size in (None, 32):
        wanted = rounding.round_rows(rows, group_size or 96)
        found = rounding_triton.round_rows(rows.to(device), group_size)
        assert torch.allclose(found.cpu(), wanted, rtol=1e-5, atol=1e-7)
        whole, scales = rounding_triton.round_to_int8(rows.to(device), group_size)
        assert scales.shape == (5, 96 // (group_size or 96))
        found = (whole.view(*scales.shape, -1) * scales[..., None]).view(5, 96)
        assert torch.allclose(found.cpu(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 300])
@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16-g128", "w4a8-g32", "w8a8-sparse24"])
def test_products_wait_for_nothing_and_can_be_captured(name, num_rows):
    chosen, rows, parts, _, wanted = draw_case(name, num_rows, torch.float16, seed=0)
    multiply, parts, there = kernel_for(chosen), moved(parts, "cuda"), rows.cuda()
    first = multiply(there, parts, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiply(there, parts, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply(there, parts, None)
    graph.replay()
    assert_close(captured, wanted, torch.float16, rows)
    assert_close(first, wanted, torch.float16, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 2048])
@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16-g32", "w4a8-g128"])
def test_products_of_a_7b(name, num_rows):
    chosen = weight_format(name)
    generator = torch.Generator().manual_seed(num_rows)
    parts = moved(chosen.pack(torch.randn(4096, 11008, generator=generator)), "cuda")
    rows = torch.randn(num_rows, 11008, generator=generator).half().cuda()
    found = kernel_for(chosen)(rows, parts, None)
    wide = chosen.multiply(rows.float(), parts, None)
    assert_close(found, wide.cpu(), torch.float16, rows.cpu())


def test_every_family_is_held_to_its_formats():
    families = {family for family, kind in LINEAR_KERNELS if kind == "cuda"}
    assert {weight_format(name).family for name in NAMES} == families


def test_they_are_chosen_where_triton_runs(monkeypatch):
    chosen = weight_format("w8a16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear_kernel(chosen, device=CUDA, widen_from=None) == chosen.multiply
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    registry = "minigpt4_runtime.kernels.registry"
    monkeypatch.setattr(f"{registry}.runs_triton", lambda capability: False)
    assert linear_kernel(chosen, device=CUDA, widen_from=None) == chosen.multiply
    monkeypatch.setattr(f"{registry}.runs_triton", lambda capability: capability == (9, 0))
    multiply = triton_products()._multiply
    for name in NAMES:
        found = linear_kernel(weight_format(name), device=CUDA, widen_from=None)
        if isinstance(found, InOrder):
            assert name.endswith("sparse24")
        elif name not in {"float", "w8a8-fp8"}:
            assert (found.func, found.args[1]) == (multiply, "a8" in name)


COMPILE = """
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
import torch
from minigpt4_runtime.kernels.rounding_triton import _round_rows, _scale_sums, rounding_sizes
from minigpt4_runtime.kernels.weight_triton import (
    _multiply_few, _multiply_one, _widen, few_sizes, one_sizes, widen_sizes,
)
from minigpt4_runtime.kernels.whole_triton import _multiply_whole, whole_sizes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NUMBERS = {"int8": "*i8", "int4": "*i32", "sparse24": "*i16", "float8": "*u8"}
COUNTS = dict.fromkeys(("num_rows", "num_outputs", "num_inputs", "width"), "i32")

def operations_of(kernel):
    # How many of each operation its machine code has.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        code = subprocess.run([dump, "-sass", file.name], check=True, capture_output=True).stdout
    return Counter(re.findall(r"\\*/\\s+(?:@!?U?P\\w+ +)?([A-Z0-9]+)", code.decode()))

def types_of(dtype, layout, group):
    floats = dict.fromkeys(("row", "rows", "bias", "product", "matrix", "rounded"), f"*{dtype}")
    zeros = "*i32" if layout == "int4" else "*i8"
    return floats | COUNTS | {
        "numbers": NUMBERS.get(layout, f"*{dtype}"), "scales": "*fp16" if group else "*fp32",
        "zeros": zeros, "places": "*u8", "sums": "*i32", "row_scales": "*fp32",
    } | ({"rows": "*fp8e4nv"} if layout == "float8" else {})

# scripts/triton_for_gpus.py compiles all others.
CASES = [
    ("fp16", 80, "int8", None, "int8", ("zeros", "places")),
    ("bf16", 90, "int4", 128, None, ("bias", "places")),
    ("bf16", 90, "int4", 32, "int8", ("bias", "places")),
    ("bf16", 89, "sparse24", None, None, ("zeros",)),
    ("bf16", 90, "float8", None, "float8", ("zeros", "places")),
    ("fp16", 80, "float", None, None, ("scales", "zeros", "places")),
]
for dtype, capability, layout, group, rounding, lacking in CASES:
    types = types_of(dtype, layout, group)
    fixed = {"LAYOUT": layout, "GROUP": group, **dict.fromkeys(lacking)}
    sizes = one_sizes(layout) | fixed | {"ROUNDING": rounding}
    count = sizes["OUTPUTS"] * sizes["INPUTS"] // (32 * sizes["num_warps"])
    aligned = ("row", "numbers", "num_inputs")
    one = compile_for(capability, _multiply_one, types, sizes, divisible=aligned)
    assert "cp.async" in one.asm["ptx"], "nothing is read ahead"
    found = operations_of(one)
    # Of which a multiprocessor makes fewer at a time than of all others.
    assert layout not in ("int8", "int4") or not found["I2F"], "numbers are converted"
    # Of a thread's numbers, each is to take one, but for what is done once.
    moved = found["LOP3"] + found["SHF"] + found["SGXT"] if layout == "int4" else 0
    assert moved < 2 * count, "numbers of 4 bits are moved one by one"
    if layout == "float":
        continue
    rows = torch.empty(64, 1, dtype=torch.uint8 if layout == "float8" else DTYPES[dtype])
    sizes = few_sizes(layout, rows, 32000) | fixed
    if layout != "float8":
        sizes["row_scales"] = None
    kernel = compile_for(capability, _multiply_few, types, sizes)
    assert kernel.metadata.shared <= 99 * 2**10, "it needs more memory than some GPUs have"
    ptx = kernel.asm["ptx"]
    assert "mma.sync" in ptx or "wgmma" in ptx, "tensor cores do not make the products"
    fixed.pop("bias", None)
    if layout != "float8":
        compile_for(capability, _widen, types, widen_sizes(layout) | fixed)

types = types_of("fp16", "int8", None)
compile_for(80, _round_rows, types, rounding_sizes(11008, 32) | {"scales": None})
for rounded in ("i8", "fp8e4nv"):
    types["rounded"] = f"*{rounded}"
    compile_for(90, _round_rows, types, rounding_sizes(11008, None))
compile_for(80, _scale_sums, types, {"OUTPUTS": 1024})

for dtype, capability, group in (("fp16", 80, 128), ("bf16", 90, 64)):
    types = types_of(dtype, "int8", group) | {"rows": "*i8", "matrix": "*i8"}
    sizes = whole_sizes(group) | ({"bias": None} if group == 128 else {})
    kernel = compile_for(capability, _multiply_whole, types, sizes)
    assert kernel.metadata.shared <= 99 * 2**10, kernel.metadata.shared
    assert "s8.s8" in kernel.asm["ptx"], "tensor cores do not multiply the whole numbers"
"""


def test_triton_compiles_them_for_gpus(tmp_path):
    run_compiler(COMPILE, tmp_path)
