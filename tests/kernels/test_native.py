"""The CPU kernels in C++: each, on each level that this processor has, against plain torch.

A weight's integers are drawn at random, and the twin multiplies by the floats that they stand for.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape
from minigpt4_runtime.formats.contracts import InOrder
from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.kernels.native import (
    prepare_w4a8,
    prepare_w4a16,
    prepare_w8a8_sparse24,
    prepare_w8a16_sparse24,
)
from minigpt4_runtime.kernels.registry import linear_kernel

native = pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
operators = torch.ops.minigpt4_kernels

# How far a product may be from its twin, as a share of the largest result. Rows of 16 bits are the
# only numbers that differ where floats stay floats; rows of 8 bits are rounded alike.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
EXAMPLES = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=native.levels())
def level(request):
    before = native.level()
    native.use_level(request.param)
    yield request.param
    native.use_level(before)


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_close(found: Tensor, truth: Tensor, size: Tensor | None = None):
    """`size` is what sums of such numbers come to, where they do not cancel out by chance."""
    assert found.shape == truth.shape
    if truth.numel():
        limit = TOLERANCE[found.dtype] * torch.maximum(truth.abs(), truth.abs().mean())
        limit = limit if size is None else torch.maximum(limit, TOLERANCE[found.dtype] * size)
        assert ((found.float() - truth).abs() <= limit).all()


def round_rows(x: Tensor, group: int) -> Tensor:
    groups = x.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).flatten(1)


def multiply(x: Tensor, numbers: Tensor, scale: Tensor, bias, integer: bool) -> tuple:
    """The twin: `numbers` (N, K) are whole, and `scale` (N, G) is for groups of them.

    Also what sums of as many such numbers come to.
    """
    group = x.shape[1] // scale.shape[1]
    wide = round_rows(x.float(), group) if integer else x.float()
    weight = (numbers.double().unflatten(1, (-1, group)) * scale.double()[..., None]).flatten(1)
    product = functional.linear(wide.double(), weight)
    size = functional.linear(wide.double().square(), weight.square()).sqrt()
    return (product if bias is None else product + bias.double()).float(), size.float()


def draw_sizes(draw, step: int, groups: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows, outputs, inputs and the group, which is the inputs themselves in a third of cases."""
    rows = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 13, 33]))
    outputs = draw(st.integers(1, 70))
    group = draw(st.sampled_from(groups))
    if group:
        inputs = group * draw(st.integers(1, 1100 // group))
    else:
        inputs = step * draw(st.one_of(st.integers(1, 40), st.integers(1, 3000 // step)))
        group = inputs
    return rows, outputs, inputs, group


@st.composite
def products(draw, step=1, groups=(0, 32, 64, 128)):
    rows, outputs, inputs, group = draw_sizes(draw, step, groups)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    torch.set_num_threads(draw(st.integers(1, 4)))
    x = torch.randn(rows, inputs, dtype=torch.float32).to(draw(st.sampled_from(DTYPES)))
    scale = torch.rand(outputs, inputs // group) * 0.1 + 0.01
    scale = (scale * (torch.rand(scale.shape) - 0.5).sign()).to(draw(st.sampled_from(DTYPES)))
    bias = torch.randn(outputs).to(x.dtype) if draw(st.booleans()) else None
    return x, scale, bias, draw(st.booleans()), draw(st.booleans())


def pack_words(nibbles: Tensor) -> Tensor:
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8).contiguous()
    return packed.flatten().view(torch.int32).view(len(nibbles), -1)


@EXAMPLES
@given(case=products())
def test_int8_equals_its_twin(level, case):
    x, scale, bias, integer, has_zero = case
    outputs, inputs = len(scale), x.shape[1]
    numbers = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    zero = torch.randint(-128, 128, scale.shape, dtype=torch.int8) if has_zero else None
    found = operators.linear_int8(x, numbers, scale, zero, bias, integer)
    shifted = numbers.float()
    if zero is not None:
        group = inputs // scale.shape[1]
        shifted = (shifted.unflatten(1, (-1, group)) - zero.float()[..., None]).flatten(1)
    assert found.dtype == x.dtype
    assert_close(found, *multiply(x, shifted, scale, bias, integer))


@EXAMPLES
@given(case=products(groups=(32, 64, 128)))
def test_int4_equals_its_twin(level, case):
    x, scale, bias, integer, has_zero = case
    outputs, inputs = len(scale), x.shape[1]
    group = inputs // scale.shape[1]
    nibbles = torch.randint(0, 16, (outputs, inputs))
    shifts = torch.full(scale.shape, 8)
    parts = {"weight_packed": pack_words(nibbles), "weight_scale": scale}
    if has_zero:
        padded = torch.randint(0, 16, (-(-outputs // 8) * 8, scale.shape[1]))
        shifts, zero = padded[:outputs], pack_words(padded.T).T.contiguous()
        parts["weight_zero_point"] = zero
    arranged, multiply_by = (prepare_w4a8 if integer else prepare_w4a16)(None).arrange(parts)
    found = multiply_by(x, arranged, bias)
    numbers = (nibbles.unflatten(1, (-1, group)) - shifts[..., None]).flatten(1)
    assert_close(found, *multiply(x, numbers, scale, bias, integer))


@EXAMPLES
@given(case=products(step=8))
def test_sparse_int8_equals_its_twin(level, case):
    x, scale, bias, integer, _ = case
    outputs, inputs = len(scale), x.shape[1]
    values = torch.randint(-128, 128, (outputs, inputs // 2), dtype=torch.int8)
    places = torch.rand(outputs, inputs // 4, 4).argsort(-1)[..., :2].sort(-1).values
    numbers = torch.zeros(outputs, inputs // 4, 4)
    numbers.scatter_(2, places, values.float().unflatten(1, (-1, 2)))
    # Four positions of 2 bits in a byte.
    fours = places.reshape(outputs, inputs // 8, 4)
    packed = (fours << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)
    prepare = prepare_w8a8_sparse24 if integer else prepare_w8a16_sparse24
    parts = {"weight_values": values, "weight_positions": packed, "weight_scale": scale}
    found = prepare(None)(x, parts, bias)
    assert_close(found, *multiply(x, numbers.flatten(1), scale, bias, integer))


@EXAMPLES
@given(case=products(groups=(0,)), dtype=st.sampled_from(DTYPES))
def test_floats_equal_their_twin(level, case, dtype):
    x, scale, bias, _, _ = case
    weight = torch.randn(len(scale), x.shape[1]).to(dtype)
    found = operators.linear_float(x, weight, bias)
    assert_close(found, *multiply(x, weight, torch.ones(len(weight), 1), bias, False))


@EXAMPLES
@given(
    sizes=st.tuples(st.integers(33, 75), st.integers(1, 300), st.integers(1, 700)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_floats_by_many_rows_equal_their_twin(level, sizes, dtypes, has_bias, seed):
    """Rows, blocks and strips that fill nothing whole, and weights of several blocks."""
    rows, outputs, inputs = sizes
    torch.manual_seed(seed)
    torch.set_num_threads(seed % 4 + 1)
    x = torch.randn(rows, inputs).to(dtypes[0])
    weight = torch.randn(outputs, inputs).to(dtypes[1])
    bias = torch.randn(outputs).to(x.dtype) if has_bias else None
    found = operators.linear_float(x, weight, bias)
    assert_close(found, *multiply(x, weight, torch.ones(outputs, 1), bias, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_floats_has_the_same_product_alone_and_among_few(level, dtype):
    torch.manual_seed(11)
    x, weight = torch.randn(32, 4500), torch.randn(27, 4500).to(dtype)
    alone = torch.cat([operators.linear_float(row[None], weight, None) for row in x])
    for rows in (*range(2, 10), 13, 32):
        assert torch.equal(operators.linear_float(x[:rows], weight, None), alone[:rows])


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row_and_its_output(level, rows, bad):
    """Also where zeros fill up a block."""
    x, weight = torch.ones(rows, 300), torch.ones(50, 300)
    truth = torch.full((rows, 50), 300.0)
    x[-1, 299], truth[-1] = bad, bad
    weight[49, 298], truth[:, 49] = bad, bad
    found = operators.linear_float(x, weight, None)
    assert torch.equal(found.nan_to_num(7, 8), truth.nan_to_num(7, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_dtype_of_the_rows_is_torchs(level, dtype):
    """Each weight's row picks one number of x: what it is as float32 is torch's own rounding."""
    x = torch.tensor([[1.0]], dtype=dtype)
    torch.manual_seed(0)
    exponents = torch.randint(-30, 30, (4096, 1)).float()
    special = torch.tensor([0.0, -0.0, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25, 1e-9])
    weight = torch.cat([torch.randn(4096, 1) * 2.0**exponents, special[:, None]])
    found = operators.linear_float(x, weight, None)
    assert torch.equal(found[0], weight[:, 0].to(dtype))


@pytest.mark.parametrize("integer", [False, True])
def test_rows_without_numbers(level, integer):
    weight = torch.ones(5, 64, dtype=torch.int8)
    scale = torch.ones(5, 1)
    for rows, outputs in ((0, 5), (3, 0)):
        x = torch.ones(rows, 64)
        found = operators.linear_int8(x, weight[:outputs], scale[:outputs], None, None, integer)
        assert found.shape == (rows, outputs)
    zeros = operators.linear_int8(torch.zeros(2, 64), weight, scale, None, torch.ones(5), integer)
    assert torch.equal(zeros, torch.ones(2, 5))


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_no_number_gives_none(level, integer, bad):
    """And leaves other rows alone."""
    x = torch.ones(3, 96)
    x[1, 70] = bad
    weight, scale = torch.ones(5, 96, dtype=torch.int8), torch.ones(5, 1)
    found = operators.linear_int8(x, weight, scale, None, None, integer)
    assert found[1].isnan().all()
    assert torch.allclose(found[[0, 2]], torch.tensor(96.0), rtol=1e-4)


def test_all_levels_give_the_same_sums():
    """Where rows are rounded to 8 bits, sums of 256 whole numbers are added up as floats."""
    torch.manual_seed(1)
    x = torch.randn(6, 704)
    weight = torch.randint(-127, 128, (33, 704), dtype=torch.int8)
    scale = torch.rand(33, 1)
    before, found = native.level(), []
    for name in native.levels():
        native.use_level(name)
        found.append(operators.linear_int8(x, weight, scale, None, None, True))
    native.use_level(before)
    for each in found[1:]:
        assert (each - found[0]).abs().max() <= 1e-6 * found[0].abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 33)}, r"x has the shape \(2, 33\), but the weight has 64 inputs"),
        ({"x": torch.ones(64, 2).T}, "x is not contiguous"),
        ({"x": torch.ones(2, 64, dtype=torch.int64)}, "x is not of float32"),
        ({"weight": torch.ones(5, 64)}, "weight is not of int8"),
        ({"scale": torch.ones(5, 3)}, r"scale has the shape \(5, 3\), which does not fit"),
        ({"scale": torch.ones(5, 4)}, "groups of 16 inputs"),
        ({"zero_point": torch.ones(5, 2, dtype=torch.int8)}, "zero_point has the shape"),
        ({"bias": torch.ones(4)}, r"bias has the shape \(4\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    good = {
        "x": torch.ones(2, 64),
        "weight": torch.ones(5, 64, dtype=torch.int8),
        "scale": torch.ones(5, 1),
        "zero_point": None,
        "bias": None,
    }
    with pytest.raises(RuntimeError, match=message):
        operators.linear_int8(**(good | arguments), integer=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": torch.ones(2, 8, 16, dtype=torch.int32)}, r"words has the shape \(2, 8, 16\)"),
        ({"words": torch.ones(1, 8, 8, dtype=torch.int32)}, r"it should have \(1, …, 16\)"),
        ({"words": torch.ones(1, 8, 16)}, "words is not of int32"),
        ({"scale": torch.ones(1, 1, 16)[:, :, :5]}, r"scale has the shape \(1, 1, 5\)"),
        ({"scale": torch.ones(1, 3, 16)}, r"scale has the shape \(1, 3, 16\), which does not fit"),
        ({"scale": torch.ones(1, 4, 16)}, "groups of 16 inputs"),
        ({"zero_point": torch.ones(1, 1, 16)}, "zero_point has the shape .*, unlike scale"),
        ({"outputs": 17}, r"it should have \(2, …, 16\)"),
        ({"outputs": -1}, "words has the shape"),
    ],
)
def test_what_does_not_fit_is_refused_in_order(arguments, message):
    good = {
        "x": torch.ones(2, 64),
        "words": torch.ones(1, 8, 16, dtype=torch.int32),
        "scale": torch.ones(1, 2, 16),
        "zero_point": None,
        "bias": None,
        "outputs": 5,
    }
    with pytest.raises(RuntimeError, match=message):
        operators.linear_int4(**(good | arguments), integer=True)


BEHIND_THE_END = """
import ctypes, mmap, sys
import torch, minigpt4_kernels
operators, page = torch.ops.minigpt4_kernels, mmap.PAGESIZE
memory = mmap.mmap(-1, 4 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(address + 3 * page), page, 0) == 0

def at_the_end(rows, columns, dtype, offset):
    size = rows * columns * dtype.itemsize
    start = 3 * page - size - offset // dtype.itemsize * dtype.itemsize
    flat = torch.frombuffer(memory, dtype=dtype, count=rows * columns, offset=start)
    return flat.view(rows, columns)

def multiply(rows, inputs, offset):
    x, scale = torch.ones(rows, inputs), torch.ones(7, 1)
    weight = at_the_end(7, inputs, torch.int8, offset)
    operators.linear_int8(x, weight, scale, None, None, True)
    words = at_the_end(inputs // 8, 16, torch.int32, offset)[None]
    scales = torch.ones(1, inputs // 32, 16)
    operators.linear_int4(x, words, scales, None, None, 7, False)
    scales = at_the_end(inputs // 32, 16, torch.float16, offset)[None]
    operators.linear_int4(x, words.clone(), scales, scales.clone(), None, 7, True)
    operators.linear_int4(x, words.clone(), scales.clone(), scales, None, 7, True)
    values = at_the_end(7, inputs // 2, torch.int8, offset)
    positions = at_the_end(7, inputs // 8, torch.uint8, offset)
    operators.linear_sparse24_int8(x, values, positions.clone(), scale, None, True)
    operators.linear_sparse24_int8(x, values.clone(), positions, scale, None, True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = at_the_end(7, inputs - 3, dtype, offset)
        operators.linear_float(x[:, 3:].contiguous(), weight, None)

for level in minigpt4_kernels.levels():
    minigpt4_kernels.use_level(level)
    for rows in (1, 5, 40):
        for inputs in (32, 96, 160, 416):
            for offset in (0, 5):
                multiply(rows, inputs, offset)
print("unharmed")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by mprotect")
def test_nothing_behind_a_mapped_files_end_is_read():
    """The page behind each weight may not be read: a process that does so dies."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEHIND_THE_END],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "unharmed\n"), done.stderr


def test_a_level_is_forced_by_the_environment():
    code = "import minigpt4_kernels; print(*minigpt4_kernels.levels(), minigpt4_kernels.level())"
    weakest = native.levels()[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
        env=os.environ | {"MINIGPT4_KERNELS_LEVEL": weakest},
    )  # fmt: skip
    assert done.stdout.split() == [*native.levels(), weakest]
    with pytest.raises(ValueError, match="has no level 'quantum'"):
        native.use_level("quantum")


FAMILIES = sorted(
    name for name in INTEGER_FORMATS if INTEGER_FORMATS[name].group_size in (None, 32, 128)
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_is_written_is_rounded_as_torch_does_it(level, name, dtype):
    """To the same numbers: large, small and alike ones, with a centre of keys and without."""
    generator = torch.Generator().manual_seed(0)
    for dim, num_tokens in ((128, 9), (40, 3), (24, 1), (6, 700)):
        shape = CacheShape(num_layers=2, num_heads=3, head_dim=dim, block_size=5)
        sides = torch.randn(2, num_tokens, 3, dim, generator=generator) * 3
        sides[:, ::3] *= 1e-7
        sides[:, 1::3, 1] = -2.5
        sides[:, 2::4, :, 5] = 30000
        keys, values = sides.to(dtype)
        slots = torch.randperm(5 * 150, generator=generator)[:num_tokens]
        for centre in (None, torch.randn(2, 3, dim, generator=generator)):
            found, truth = (
                CACHE_FORMATS[name].create(shape, 150, dtype=name, device=torch.device("cpu"))
                for _ in range(2)
            )
            for cache in (found, truth):
                cache.numbers.zero_()
                cache.scales.zero_()
                cache.key_centre = centre
            truth.write(1, slots, keys, values)
            operators.write_rounded_(
                found.numbers[1], found.scales[1], slots, keys, values,
                None if centre is None else centre[1],
            )  # fmt: skip
            assert torch.equal(found.scales, truth.scales)
            assert torch.equal(found.numbers, truth.numbers)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_when_it_is_written(level, name, bad):
    shape = CacheShape(num_layers=1, num_heads=2, head_dim=32, block_size=4)
    cache = CACHE_FORMATS[name].create(shape, 1, dtype=name, device=torch.device("cpu"))
    rows = torch.randn(4, 2, 32).index_fill(2, torch.tensor(5), bad)
    operators.write_rounded_(cache.numbers[0], cache.scales[0], torch.arange(4), rows, rows, None)
    for side in cache.read(0, torch.arange(4)):
        assert not side[:, :, 5].isfinite().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.tensor([0, 4])}, "slot 4 is none of the cache's 4"),
        ({"slots": torch.tensor([-1, 2])}, "slot -1 is none"),
        ({"slots": torch.arange(3)}, "do not fit slots of the shape"),
        ({"values": torch.zeros(2, 2, 4)}, "values of the shape"),
        ({"scales": torch.zeros(2, 1, 4, 2)}, "scales of the shape"),
        ({"scales": torch.zeros(2, 1, 4, 1).half()}, "scales is not of float32"),
        ({"numbers": torch.zeros(2, 1, 4, 1, 8)}, "numbers is not of int8 or uint8"),
        ({"centre": torch.zeros(8)}, "centre has the shape"),
    ],
)
def test_what_cannot_be_written_is_refused(changes, message):
    arguments = {
        "numbers": torch.zeros(2, 1, 4, 1, 8, dtype=torch.int8), "scales": torch.zeros(2, 1, 4, 1),
        "slots": torch.arange(2), "keys": torch.zeros(2, 1, 8), "values": torch.zeros(2, 1, 8),
        "centre": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        operators.write_rounded_(**arguments | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_formats_kernel_is_its_own_product(level, name):
    """Of a packed weight, through the table of kernels, with rows of any shape."""
    torch.manual_seed(3)
    weight_format = INTEGER_FORMATS[name]
    parts = weight_format.pack(torch.randn(24, 384))
    kernel = linear_kernel(weight_format, device=torch.device("cpu"), widen_from=None)
    assert kernel != weight_format.multiply
    held = parts
    if isinstance(kernel, InOrder):
        held, kernel = kernel.arrange(parts)
    for rows in (torch.randn(2, 5, 384), torch.randn(384, 3).T, torch.randn(384)):
        bias = torch.randn(24)
        truth = weight_format.multiply(rows, parts, bias)
        assert_close(kernel(rows, held, bias), truth)
