"""Which launches overlap, and that a kernel waits for the one ahead, however late that is."""

import pytest
import torch
from step_batches import Cached, batch_of
from triton_cases import PLACES, skip_unless_interpreted

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from minigpt4_runtime.cache.key_value import FloatCache
from minigpt4_runtime.kernels import launching
from minigpt4_runtime.kernels.attention_triton import TritonAttention
from minigpt4_runtime.kernels.rounding_triton import round_rows
from minigpt4_runtime.kernels.row_operations_triton import TritonOperations
from minigpt4_runtime.kernels.weight_triton import StoredWeight, few_sizes, one_sizes

ROWS, WIDTH = 2, 256
# Far longer than Python takes to launch what comes next.
LATE_BY = 20_000_000  # Nanoseconds.


@pytest.mark.parametrize(
    ("device", "capability", "driver", "cuda", "overlaps"),
    [
        ("cuda:0", (9, 0), 12030, "12.6", True),
        ("cuda:0", (10, 0), 13000, "13.0", True),
        ("cuda:0", (8, 9), 13000, "13.0", False),
        ("cuda:0", (9, 0), 12020, "12.6", False),
        ("cuda:0", (9, 4), 0, None, False),  # A build for AMD's GPUs calls them cuda too.
        ("cpu", (9, 0), 13000, "13.0", False),
    ],
)
def test_kernels_overlap_where_the_gpu_and_its_driver_can(
    monkeypatch, device, capability, driver, cuda, overlaps
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.delenv("MINIGPT4_OVERLAP", raising=False)
    launching.can_overlap.cache_clear()
    found = launching.overlapping(torch.device(device))
    launching.can_overlap.cache_clear()
    assert found["OVERLAPS"] is overlaps
    assert found.get("launch_pdl", False) is overlaps
    monkeypatch.setenv("MINIGPT4_OVERLAP", "off")
    assert launching.overlapping(torch.device(device)) == {"OVERLAPS": False}
    launching.can_overlap.cache_clear()


def test_what_is_fetched_ahead_fits_into_the_cache_beside_other_weights():
    """Programs that an H200 has at once: 8 or 3 on each multiprocessor, by their registers."""
    rows, third_of_cache = torch.empty(64, 1, dtype=torch.float16), 50 * 2**20 // 3
    sizes = [(one_sizes("int8"), 8), *((few_sizes("int8", rows, n), 3) for n in (4096, 32000))]
    for each, programs in sizes:
        assert 132 * programs * each["OUTPUTS"] * each["FETCHED"] <= third_of_cache


@triton.jit
def _fill_late(numbers, given, SIZE: tl.constexpr, NANOSECONDS: tl.constexpr):
    """What comes next may begin at once; its numbers come late."""
    tl.extra.cuda.gdc_launch_dependents()
    until = tl.extra.cuda.globaltimer() + NANOSECONDS
    while tl.extra.cuda.globaltimer() < until:
        pass
    places = tl.arange(0, SIZE)
    tl.store(numbers + places, tl.load(given + places))


@triton.jit
def _copy_at_once(numbers, found, SIZE: tl.constexpr):
    """What no kernel may do that begins early: read without waiting."""
    places = tl.arange(0, SIZE)
    tl.store(found + places, tl.load(numbers + places))


@pytest.fixture(params=PLACES)
def device(request):
    if request.param == "cpu":
        skip_unless_interpreted()
    elif not launching.can_overlap(torch.device(request.param)):
        pytest.skip("kernels do not overlap on this GPU")
    return request.param


def fill(numbers, given):
    if numbers.device.type == "cpu":
        numbers.copy_(given)
    else:
        _fill_late[(1,)](numbers, given, SIZE=given.numel(), NANOSECONDS=LATE_BY)


def attention(device):
    """Keys are cached, attended in shares, and these are joined: three kernels."""
    cache = FloatCache(*torch.randn(2, 1, 26, 16, 2, WIDTH // 2, device=device).half())
    blocks = torch.arange(26).view(ROWS, 13).tolist()
    sequences = [Cached(row, 1, 200, tuple(each)) for row, each in enumerate(blocks)]
    attend = TritonAttention(cache)(batch_of(sequences, 16, device))
    return lambda rows: attend(0, *[rows.view(ROWS, 2, WIDTH // 2)] * 3)


def one_product(device):
    weight = StoredWeight("float", torch.randn(64, WIDTH, device=device).half(), None)
    return lambda rows: weight.multiply_one(rows[:1], None)


def few_products(device):
    numbers = torch.randint(-127, 128, (64, WIDTH), dtype=torch.int8, device=device)
    weight = StoredWeight("int8", numbers, torch.rand(64, 1, device=device))
    return lambda rows: weight.multiply_few(rows, None)


def norm(device):
    weight = torch.rand(WIDTH, device=device).half()
    return lambda rows: TritonOperations().add_and_norm(rows, None, weight, 1e-5)[1]


COMPUTATIONS = {
    "attention": attention,
    "one product": one_product,
    "few products": few_products,
    "norm": norm,
    "gate": lambda device: lambda rows: TritonOperations().gate(rows, rows),
    "rounding": lambda device: lambda rows: round_rows(rows, None),
}


@pytest.mark.parametrize("what", COMPUTATIONS)
def test_a_kernel_waits_for_one_that_is_late(device, monkeypatch, what):
    """On a GPU that can overlap them; elsewhere only the computations are tried."""
    compute = COMPUTATIONS[what](device)
    before, after = torch.randn(2, ROWS, WIDTH, device=device).half()
    rows = torch.empty_like(before)
    for given in (before, after):  # The first time it is compiled, and leaves other numbers.
        fill(rows, given)
        found = compute(rows)
    monkeypatch.setattr(launching, "can_overlap", lambda device: False)
    assert torch.equal(found, compute(after))
    assert not torch.equal(found, compute(before))


@pytest.mark.gpu
def test_what_does_not_wait_is_too_early():
    """So the test above can fail."""
    if not launching.can_overlap(torch.device("cuda")):
        pytest.skip("kernels do not overlap on this GPU")
    before, after = torch.randn(2, ROWS, WIDTH, device="cuda")
    rows, found = torch.empty_like(before), torch.empty_like(before)
    for given in (before, after):
        fill(rows, given)
        _copy_at_once[(1,)](rows, found, SIZE=rows.numel(), launch_pdl=True)
    assert torch.equal(found, before)
    assert torch.equal(rows, after)
