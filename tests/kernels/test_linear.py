"""Which product a Linear multiplies by: chosen once by format and device."""

import pytest
import torch
from torch.nn import functional

from minigpt4_runtime.formats.dense import DENSE, Dense
from minigpt4_runtime.kernels import linear_dense, native
from minigpt4_runtime.kernels.linear_dense import FEW_ROWS
from minigpt4_runtime.kernels.registry import LINEAR_KERNELS, linear_kernel
from minigpt4_runtime.model.linear import Linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def narrow(rows, weight, bias):
    return functional.linear(rows, weight, bias)


def widened(rows, weight, bias):
    return functional.linear(rows.float(), weight.float(), bias.float()).to(rows.dtype)


@pytest.mark.parametrize(
    ("dtype", "rows_dtype", "widen_from", "num_rows", "wanted"),
    [
        (torch.float32, torch.float32, None, 100, narrow),
        (torch.float16, torch.float16, None, 100, narrow),
        (torch.float16, torch.float16, 32, 31, narrow),
        (torch.float16, torch.float16, 32, 32, widened),
        (torch.bfloat16, torch.bfloat16, 64, 63, narrow),
        (torch.bfloat16, torch.bfloat16, 64, 64, widened),
        # Rows wider than the weight always widen it.
        (torch.float16, torch.float32, None, 1, widened),
        (torch.bfloat16, torch.float32, 64, 1, widened),
    ],
)
def test_torchs_route_of_a_dense_product(
    monkeypatch, dtype, rows_dtype, widen_from, num_rows, wanted
):
    """Without the CPU kernels and of a small weight, exact to the last bit."""
    monkeypatch.setattr(native, "float_product", lambda: None)
    generator = torch.Generator().manual_seed(num_rows)
    linear = Linear(96, 40, bias=True)
    linear.use(DENSE, linear_kernel(DENSE, device=CPU, widen_from=widen_from))
    linear = linear.requires_grad_(False).to(dtype)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    rows = torch.randn(num_rows, 96, generator=generator).to(rows_dtype)
    truth = wanted(rows, linear.weight, linear.bias)
    for shape in ((num_rows, 96), (1, num_rows, 96)):
        found = linear(rows.view(shape))
        assert found.dtype == rows_dtype
        assert torch.equal(found.view(truth.shape), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("level", ["avx2", "avx512"])
@pytest.mark.parametrize("is_slow", [False, True])
def test_which_rows_go_to_the_cpu_kernels(monkeypatch, dtype, rows_dtype, level, is_slow):
    """Few always; many where they are faster than torch. The product is the same."""
    pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
    torch.manual_seed(5)
    counts = []
    ours = native.float_product()

    def count(rows, parts, bias):
        counts.append(len(rows))
        return ours(rows, parts, bias)

    monkeypatch.setattr(native, "float_product", lambda: count)
    monkeypatch.setattr(native, "level", lambda: level)
    monkeypatch.setattr(linear_dense, "torch_is_slow_in_float32", lambda: is_slow)
    multiply = linear_kernel(DENSE, device=CPU, widen_from=None)
    parts = {"weight": torch.randn(40, 96).to(dtype)}
    all_rows = torch.randn(FEW_ROWS + 1, 96).to(rows_dtype)
    assert len(multiply(all_rows[:2], parts, None)) == 2
    assert counts == []  # A small weight is torch's.
    monkeypatch.setattr(linear_dense, "LEAST_NUMBERS", 40 * 96)
    for rows in (all_rows[:1], all_rows[:FEW_ROWS], all_rows):
        found = multiply(rows, parts, None)
        truth = functional.linear(rows.double(), parts["weight"].double())
        assert found.dtype == rows_dtype
        assert torch.allclose(found.double(), truth, rtol=1e-2, atol=0.02)
    takes_many = level == "avx2" and (is_slow or dtype != torch.float32)
    assert counts == [1, FEW_ROWS, FEW_ROWS + 1][: 3 if takes_many else 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float16])
def test_onednn_multiplies_many_rows_where_torch_is_slow(monkeypatch, dtype, rows_dtype):
    """It is compared with float64: its sums come in another order than MKL's."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(native, "level", lambda: "avx512")  # Else the CPU kernels multiply.
    generator = torch.Generator().manual_seed(3)
    weight, rows, bias = (
        torch.randn(shape, generator=generator) for shape in ((520, 515), (2, FEW_ROWS, 515), 520)
    )
    parts, rows, bias = {"weight": weight.to(dtype)}, rows.to(rows_dtype), bias.to(dtype)
    truth = functional.linear(rows.double(), parts["weight"].double(), bias.double())
    for is_slow in (True, False):
        monkeypatch.setattr(linear_dense, "torch_is_slow_in_float32", lambda slow=is_slow: slow)
        found = linear_dense.prepare(widen_from=16)(rows, parts, bias)
        assert found.dtype == rows_dtype
        bound = 1e-4 if rows_dtype == torch.float32 else 0.05
        assert (found - truth).abs().max() < bound
    empty = linear_kernel(DENSE, device=CPU, widen_from=None)(rows[:, :0], parts, None)
    assert empty.shape == (2, 0, 520)


class Other(Dense):
    name, family = "other-of-one-size", "other"


def prepare(widen_from):
    return (prepare, widen_from)


def test_a_format_without_a_row_multiplies_by_itself(monkeypatch):
    other = Other()
    assert linear_kernel(other, device=CUDA, widen_from=7) == other.multiply
    monkeypatch.setitem(LINEAR_KERNELS, ("other", "*"), f"{__name__}:prepare")
    assert linear_kernel(other, device=CUDA, widen_from=7) == (prepare, 7)
    monkeypatch.setitem(LINEAR_KERNELS, ("other", "meta"), f"{__name__}:no_such_thing")
    with pytest.raises(AttributeError):
        linear_kernel(other, device=torch.device("meta"), widen_from=None)
    assert linear_kernel(other, device=CPU, widen_from=None) == (prepare, None)
