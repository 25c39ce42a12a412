"""Triton's choice of ids against torch's, which defines correct."""

import pytest
import torch
from triton_cases import PLACES, run_compiler, skip_unless_interpreted

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.engine.drawing import TORCH_CHOICE
from minigpt4_runtime.kernels import registry
from minigpt4_runtime.kernels.contracts import Lots

# Together and alone: of neighbours, some rows have limits that others have not.
SETTINGS = [
    {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1}, {"top_p": 1e-9},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.001, "temperature": 1.7}, {"temperature": 1e-300},
    {"temperature": 1e6, "top_p": 0.999}, {"temperature": 0.3, "top_p": 0.999, "top_k": 3000},
]  # fmt: skip


@pytest.fixture(params=PLACES)
def device(request):
    if request.param == "cpu":
        skip_unless_interpreted()
    return request.param


@pytest.fixture
def choice(monkeypatch, device):
    """Several stretches of a row, also of small ones."""
    from minigpt4_runtime.kernels import choosing_triton

    monkeypatch.setattr(choosing_triton, "_IDS_AT_ONCE", 256)
    return choosing_triton.TritonChoice()


def lots(seed, settings=SETTINGS):
    asked = [SamplingParams(**{"temperature": 1.0, **each}) for each in settings]
    keys = torch.randint(-(2**63), 2**63 - 1, (len(asked),), generator=seeded(seed))
    return Lots(tuple(asked), tuple(keys.tolist()))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_scores(seed, size):
    """Those of each row, many alike in every second one, and some forbidden."""
    scores = 3 * torch.randn(len(SETTINGS), size, generator=seeded(seed))
    scores[1::2] = scores[1::2].round()
    scores[torch.rand(scores.shape, generator=seeded(seed + 1)) < 0.1] = float("-inf")
    return scores


@pytest.mark.parametrize("size", [3, 700])
def test_draws_are_those_of_torch(device, choice, size):
    scores, asked = draw_scores(size, size), lots(size)
    before = scores.clone()
    found = choice.draw(scores.to(device), asked)
    assert found.dtype is torch.int64
    assert found.tolist() == TORCH_CHOICE.draw(scores, asked).tolist()
    assert scores.equal(before)


def test_what_is_dropped_is_what_torch_drops(device, choice):
    """Of ids that are alike, as many of the first as fit into what is dropped: no key draws them.

    All shares are powers of two, so that nothing is rounded.
    """
    scores = torch.full((1, 300), float("-inf"))
    scores[0, 280:282] = 0.0
    scores[0, 10:14] = -torch.tensor(2.0).log()  # Half as likely as the two: a half in all.
    many, settings = 12, [{"top_p": 0.75}]
    asked = Lots(lots(0, settings * many).settings, lots(5, settings * many).keys)
    found = choice.draw(scores.expand(many, -1).to(device), asked).tolist()
    assert found == TORCH_CHOICE.draw(scores.expand(many, -1), asked).tolist()
    # A quarter is dropped: two of the four that are half as likely, the first ones.
    assert set(found) == {12, 13, 280, 281}


def test_the_best_is_the_first_of_the_largest(device, choice):
    logits = torch.randn(6, 700, generator=seeded(0))
    logits[0, [300, 650]] = 9.0
    logits[1, 699] = logits[2, 0] = 9.0
    logits[3, 400], logits[4, 5], logits[5, 699] = (float(x) for x in ("nan", "inf", "-inf"))
    found, wanted = choice.best(logits.to(device)).cpu(), TORCH_CHOICE.best(logits)
    assert found.dtype is wanted.dtype is torch.int64
    assert found[1].tolist() == wanted[1].tolist() == [1, 1, 1, 0, 0, 0]
    assert found[0, :3].tolist() == wanted[0, :3].tolist() == [300, 699, 0]


@pytest.mark.gpu
def test_a_vocabulary_of_a_7b_is_drawn_from_as_by_torch():
    """64 rows: no draw of these lies where rounding decides."""
    from minigpt4_runtime.kernels.choosing_triton import TritonChoice

    scores, settings = (
        3 * torch.randn(64, 32_000, generator=seeded(0)),
        {"top_p": 0.9, "top_k": 200},
    )
    asked = lots(1, [settings] * 32 + [{"top_p": 0.9}] * 32)
    assert (
        TritonChoice().draw(scores.cuda(), asked).tolist()
        == TORCH_CHOICE.draw(scores, asked).tolist()
    )
    assert TritonChoice().best(scores.cuda()).tolist() == TORCH_CHOICE.best(scores).tolist()


@pytest.mark.gpu
def test_drawing_waits_for_nothing():
    from minigpt4_runtime.kernels.choosing_triton import TritonChoice

    scores, asked = draw_scores(0, 700).cuda(), lots(0)
    TritonChoice().draw(scores, asked)
    torch.cuda.set_sync_debug_mode("error")
    try:
        TritonChoice().draw(scores, asked)
        TritonChoice().best(scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILE = """
from minigpt4_runtime.kernels.choosing_triton import _draw, _find_best

types = {
    "logits": "*fp32", "found": "*i64", "scores": "*fp32", "numbers": "*fp64", "shares": "*fp64",
    "chosen": "*i64", "num_rows": "i32", "vocab_size": "i32",
}
for capability, kernel in ((80, _find_best), (90, _draw)):
    compile_for(capability, kernel, types, {"IDS": 4096, "num_warps": 16})
"""


def test_triton_compiles_them_for_gpus(tmp_path):
    run_compiler(COMPILE, tmp_path)


def test_it_is_chosen_where_triton_runs(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from minigpt4_runtime.kernels.choosing_triton import TritonChoice

    monkeypatch.setattr(registry, "_runs_kernels", lambda device: True)
    assert isinstance(registry.row_choice(torch.device("cuda")), TritonChoice)
    assert registry.row_choice(torch.device("cpu")) is None
    monkeypatch.setattr(registry, "_runs_kernels", lambda device: False)
    assert registry.row_choice(torch.device("cuda")) is None
