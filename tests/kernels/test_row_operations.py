"""What lies between products: the kernels in C++ against torch, which defines correct."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4_runtime.kernels import native as kernels
from minigpt4_runtime.kernels.registry import row_operations
from minigpt4_runtime.kernels.row_operations_native import NativeOperations, prepare
from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS

native = pytest.importorskip("minigpt4_kernels", reason="the CPU kernels are not built")
operators = torch.ops.minigpt4_kernels
EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=native.levels())
def level(request):
    before, threads = native.level(), torch.get_num_threads()
    native.use_level(request.param)
    yield request.param
    native.use_level(before)
    torch.set_num_threads(threads)


@st.composite
def pairs(draw):
    """Two tensors of rows of one size, and a weight; some are large enough for several threads."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    torch.set_num_threads(draw(st.integers(1, 4)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rows = draw(st.sampled_from([0, 1, 1, 2, 5, 70]))
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from([4096, 11008])))
    size = 10.0 ** draw(st.integers(-3, 1))
    first, second = (torch.randn(2, rows, width) * size).to(dtype)
    return first, second, torch.randn(width).to(dtype)


def assert_close(found, wanted):
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    # One place of the dtype's: sums in another order may round to the other side.
    rtol = max(2 * torch.finfo(found.dtype).eps, 2e-6)
    assert torch.allclose(found.float(), wanted.float(), rtol=rtol, atol=1e-7)


@EXAMPLES
@given(case=pairs(), eps=st.sampled_from([1e-6, 1e-5]))
def test_norms_are_torch_s(level, case, eps):
    hidden, added, weight = case
    ours, kept = NativeOperations(), hidden.clone()
    for more in (None, added):
        wanted_sum, wanted = TORCH_OPERATIONS.add_and_norm(hidden, more, weight, eps)
        given = None if more is None else more.clone()
        found_sum, found = ours.add_and_norm(hidden, given, weight, eps)
        assert torch.equal(found_sum, wanted_sum)
        assert_close(found, wanted)
        assert torch.equal(hidden, kept)


@EXAMPLES
@given(case=pairs())
def test_gates_are_torch_s(level, case):
    gate, up, _ = case
    assert_close(NativeOperations().gate(gate.clone(), up), TORCH_OPERATIONS.gate(gate, up))


def test_gates_of_large_numbers_and_of_none(level):
    gate = torch.tensor([[-1e30, -200.0, -80.0, 0.0, 80.0, 1e30, float("inf"), float("nan")]])
    found = NativeOperations().gate(gate.clone(), torch.ones_like(gate))
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0, 80.0, 1e30, float("inf"), float("nan")]])
    assert torch.allclose(found, wanted, atol=1e-6, equal_nan=True)


def test_a_row_without_numbers_leaves_others_alone(level):
    hidden = torch.ones(3, 70)
    hidden[1, 66] = float("nan")
    _, found = NativeOperations().add_and_norm(hidden, None, torch.ones(70), 1e-6)
    assert found[1].isnan().all()
    assert torch.allclose(found[[0, 2]], torch.ones(2, 70))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.ones(4, 2).T}, "hidden is not contiguous"),
        ({"hidden": torch.ones(2, 4, dtype=torch.int64)}, "hidden is not of float32"),
        ({"added": torch.ones(3, 4)}, r"added of the shape \(3, 4\) should be like hidden"),
        ({"added": torch.ones(2, 4).half()}, "added of the shape .* and of its type"),
        ({"weight": torch.ones(5)}, r"weight has the shape \(5\), but hidden has 4 columns"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    good = {"hidden": torch.ones(2, 4), "added": None, "weight": torch.ones(4)}
    with pytest.raises(RuntimeError, match=message):
        operators.add_rms_norm_(**(good | arguments), epsilon=1e-6)
    with pytest.raises(RuntimeError, match="up of the shape"):
        operators.gate_(torch.ones(2, 4), torch.ones(2, 5))


def test_they_are_chosen_on_a_cpu_alone_and_where_they_are_installed(monkeypatch):
    assert isinstance(row_operations(torch.device("cpu")), NativeOperations)
    assert row_operations(torch.device("meta")) is TORCH_OPERATIONS
    monkeypatch.setattr(kernels, "find", lambda: (None, "absent"))
    assert prepare() is TORCH_OPERATIONS
