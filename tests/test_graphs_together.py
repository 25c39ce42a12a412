"""Answers from graphs are those without: on a CPU that replays what was captured."""

import pytest
import torch
from fake_graphs import use_graphs
from golden_cases import GOLDENS, Golden, run_together

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.vision.torch import TorchVisionEncoder

ENGINES = {
    "as it comes": {},
    "odd sizes": {"max_running": 11, "block_size": 7},
    "pushed out": {"max_step_tokens": 48, "max_running": 24, "num_blocks": 22},
    "nothing kept": {"prefix_cache": False},
}


def load(model_dir, **engine) -> MiniGPT4:
    return MiniGPT4.load(model_dir, device="cpu", dtype="float32", engine=engine)


@pytest.mark.parametrize(
    ("engine", "runs_ahead"),
    [*((engine, True) for engine in ENGINES), ("as it comes", False), ("pushed out", False)],
)
def test_the_originals_tokens_from_every_search(golden_model_dir, monkeypatch, engine, runs_ahead):
    recorder = use_graphs(monkeypatch, runs_ahead=runs_ahead)
    model = load(golden_model_dir("llama2-gqa"), **ENGINES[engine])
    run_together(Golden(GOLDENS / "llama2-gqa", model), most=3)
    assert recorder.num_replayed > recorder.num_captured > 0
    assert model.stats().num_preempted > 0 or engine != "pushed out"


def answers(model, count):
    """Of so many requests at once: greedy and drawn ones, of different lengths."""
    tickets = [
        model.probe.submit_tokens(
            (1, *range(3, 12), 20 + number),
            SamplingParams(
                max_new_tokens=4 + number % 3 * 5, ignore_eos=True, temperature=number % 2 * 0.9,
                seed=number,
            ),
        )
        for number in range(count)
    ]  # fmt: skip
    return [list(ticket) for ticket in tickets]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_as_without_graphs(golden_model_dir, monkeypatch, count):
    model_dir = golden_model_dir("vicuna")
    recorder = use_graphs(monkeypatch)
    plain, graphs = (load(model_dir, cuda_graphs=choice) for choice in ("off", "auto"))
    use_graphs(monkeypatch, runs_ahead=True)
    ahead = load(model_dir)
    expected = answers(plain, count)
    assert recorder.num_captured == 0
    assert answers(graphs, count) == expected
    assert recorder.num_replayed > 0
    assert answers(ahead, count) == expected


def test_ranks_whose_sums_are_no_work_of_the_device_are_not_captured(golden_model_dir, monkeypatch):
    recorder = use_graphs(monkeypatch)
    with MiniGPT4.load(
        golden_model_dir("vicuna"), device="cpu", dtype="float32", tensor_parallel=2
    ) as model:
        answers(model, 2)
    assert recorder.num_captured == 0


@pytest.mark.gpu
def test_rows_of_pictures_from_graphs_of_a_gpu(golden_model_dir):
    backend = open_device("cuda")
    model_dir = golden_model_dir("vicuna")
    part = load_vision(model_dir, dtype=torch.float32).to(backend.device)
    graphs, plain = (TorchVisionEncoder(part, capture=each) for each in (backend.capture, None))
    side = load_config(model_dir).vision.image_size
    for count in (3, 1, 10):
        pixels = torch.randn(count, 3, side, side)
        torch.testing.assert_close(
            graphs.encode(pixels), plain.encode(pixels), atol=1e-4, rtol=1e-4
        )
