"""What lies between products on CUDA: Triton's kernels against torch, which defines correct."""

import pytest
import torch
from triton_cases import PLACES, mend_rounding, run_compiler, skip_unless_interpreted

from minigpt4_runtime.kernels.registry import ROW_OPERATIONS, row_operations
from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 7, 300, 4096, 11008]


@pytest.fixture(params=PLACES)
def device(request):
    if request.param == "cpu":
        skip_unless_interpreted()
    return request.param


@pytest.fixture
def operations():
    from minigpt4_runtime.kernels.row_operations_triton import TritonOperations

    return TritonOperations()


def draw(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found, wanted):
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    # The interpreter cuts bfloat16 off where a GPU rounds, so a number may be one place lower.
    places = 4 if found.dtype is torch.bfloat16 else 2
    rtol = max(places * torch.finfo(found.dtype).eps, 2e-6)
    assert torch.allclose(found.float().cpu(), wanted.float(), rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_norms_are_torchs(device, operations, width, dtype):
    hidden, added = draw(2, 3, width, dtype=dtype, seed=width)
    weight = draw(width, dtype=dtype, seed=1)
    for more in (None, added):
        wanted_sum, wanted = TORCH_OPERATIONS.add_and_norm(hidden, more, weight, 1e-5)
        there = hidden.to(device)
        given = None if more is None else more.to(device, copy=True)
        found_sum, found = operations.add_and_norm(there, given, weight.to(device), 1e-5)
        assert_close(found_sum, wanted_sum)
        assert_close(found, wanted)
        assert torch.equal(there.cpu(), hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 300, 1408])
def test_sums_and_layer_norms_are_torchs(device, operations, width, dtype, monkeypatch):
    """Off 0 too, where the mean has to go before squares are summed."""
    if device == "cpu":
        mend_rounding(monkeypatch)
    hidden, added, weight, bias = (
        draw(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(2, 3, width), (2, 3, width), (width,), (width,)])
    )
    hidden += 5
    for more in (None, added):
        wanted_sum, wanted = TORCH_OPERATIONS.add_and_layer_norm(hidden, more, weight, bias, 1e-6)
        there = hidden.to(device)
        given = None if more is None else more.to(device, copy=True)
        found_sum, found = operations.add_and_layer_norm(
            there, given, weight.to(device), bias.to(device), 1e-6
        )
        assert_close(found_sum, wanted_sum)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        far = (found.float().cpu() - wanted.float()).abs().max() / wanted.abs().max()
        assert far <= max(2 * torch.finfo(dtype).eps, 1e-5)
        assert torch.equal(there.cpu(), hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gates_are_torchs(device, operations, width, dtype):
    gate, up = draw(2, 3, width, dtype=dtype, seed=width)
    wanted = TORCH_OPERATIONS.gate(gate, up)
    assert_close(operations.gate(gate.to(device, copy=True), up.to(device)), wanted)
    # As views of one product.
    both = torch.cat([gate, up], -1).to(device).split(width, -1)
    found = operations.gate(*both)
    assert_close(found, wanted)
    assert found.is_contiguous()


def test_a_row_without_numbers_leaves_others_alone_and_no_rows_are_none(device, operations):
    hidden = torch.ones(3, 70, device=device)
    hidden[1, 66] = float("nan")
    weight = torch.ones(70, device=device)
    _, found = operations.add_and_norm(hidden, None, weight, 1e-6)
    assert found[1].isnan().all()
    assert torch.allclose(found[[0, 2]], torch.ones(2, 70, device=device))
    _, found = operations.add_and_norm(hidden[:0], hidden[:0].clone(), weight, 1e-6)
    assert found.shape == operations.gate(hidden[:0], hidden[:0]).shape == (0, 70)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # As the interpreter says.
def test_gates_of_large_numbers(device, operations):
    gate = torch.tensor([[-1e30, -200.0, -80.0, 0.0, 80.0, 1e30, float("inf"), float("nan")]])
    found = operations.gate(gate.to(device), torch.ones_like(gate, device=device)).cpu()
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0, 80.0, 1e30, float("inf"), float("nan")]])
    assert torch.allclose(found, wanted, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_they_can_be_captured(operations):
    hidden, added = draw(2, 3, 4096, dtype=torch.float16, seed=0).cuda()
    weight, graph = torch.ones(4096, device="cuda").half(), torch.cuda.CUDAGraph()
    wanted = operations.add_and_norm(hidden, added.clone(), weight, 1e-5)[1]
    operations.gate(hidden, added)  # Compiled before it is captured.
    with torch.cuda.graph(graph):
        found = operations.add_and_norm(hidden, added.clone(), weight, 1e-5)[1]
        gated = operations.gate(hidden.clone(), added)
    graph.replay()
    assert torch.equal(found, wanted)
    assert_close(gated, TORCH_OPERATIONS.gate(hidden, added).cpu())


COMPILE = """
from minigpt4_runtime.kernels.row_operations_triton import _add_and_norm, _gate, norm_sizes

for dtype, capability in (("fp16", 80), ("bf16", 90), ("fp32", 90)):
    names = ("hidden", "added", "weight", "bias", "normed", "gate", "up", "product")
    rows = dict.fromkeys(names, f"*{dtype}")
    types = rows | {"width": "i32", "gate_step": "i32", "up_step": "i32", "eps": "fp32"}
    for more in ({}, {"added": None}):
        compile_for(capability, _add_and_norm, types, norm_sizes(5120) | more | {"bias": None})
        compile_for(capability, _add_and_norm, types, norm_sizes(1408) | more)
    compile_for(capability, _gate, types, {"NUMBERS": 1024})
"""


def test_triton_compiles_them_for_gpus(tmp_path):
    run_compiler(COMPILE, tmp_path)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_they_are_chosen_where_triton_runs(monkeypatch, capability):
    pytest.importorskip("triton", reason="triton is not installed")
    from minigpt4_runtime.kernels.row_operations_triton import TritonOperations

    assert set(ROW_OPERATIONS) == {"cpu", "cuda"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("minigpt4_runtime.optional.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("minigpt4_runtime.optional.Path.is_file", lambda path: True)
    chosen = row_operations(torch.device("cuda", 1))
    assert isinstance(chosen, TritonOperations) == (capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row_operations(torch.device("cuda")) is TORCH_OPERATIONS
