"""How a CUDA device captures: against a stand-in for torch's graphs, and on a GPU."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from minigpt4_runtime.devices.cuda import CudaBackend


class FakeGraphs:
    """What `CudaBackend.capture` uses of torch.cuda; a replay computes nothing.

    As in torch, the first graph of a process makes a tensor, which captures and replays fill.
    """

    def __init__(self):
        self.seed = None
        self.places = []  # Of each capture: its pool, its stream, how other threads are watched.
        self.streams = []

    def stream(self, device=None):
        self.streams.append(SimpleNamespace(device=device, wait_stream=lambda other: None))
        return self.streams[-1]

    def fill(self):
        self.seed.fill_(7)

    @contextmanager
    def graph(self, graph, pool, stream, *, capture_error_mode):
        self.seed = torch.empty(1, dtype=torch.int64) if self.seed is None else self.seed
        self.fill()
        self.places.append((pool, stream, capture_error_mode))
        yield

    def install(self, monkeypatch):
        stand_ins = {
            "is_available": lambda: True, "device_count": lambda: 1,
            "get_device_capability": lambda device: (9, 0), "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: SimpleNamespace(replay=self.fill),
            "Stream": self.stream, "graph": self.graph,
            "device": nullcontext, "stream": nullcontext, "current_stream": FakeGraphs().stream,
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda is_wanted: None)
    found = FakeGraphs()
    found.install(monkeypatch)
    return found


def test_all_graphs_share_a_stream_and_so_their_memory(graphs):
    backend = CudaBackend()
    for _ in range(3):
        backend.capture(lambda: torch.ones(1))
    assert graphs.places == [("pool", graphs.streams[0], "thread_local")] * 3
    assert len(graphs.streams) == 1


def test_a_graph_of_the_engine_leaves_others_possible(graphs):
    """The engine captures in inference mode, and what is tuned or measured may not."""
    backend, seen = CudaBackend(), []

    def compute():
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return torch.ones(1)

    with torch.inference_mode():
        first = backend.capture(compute)
    with torch.no_grad():
        second = backend.capture(compute)
    third = backend.capture(compute)
    # Once to warm up and once to be recorded, each as its caller would compute it.
    assert seen == [(True, False)] * 2 + [(False, False)] * 2 + [(False, True)] * 2
    for replay in (first, second, third):
        replay()
    with torch.inference_mode():
        assert [float(replay()) for replay in (first, second, third)] == [1.0] * 3


@pytest.mark.gpu
def test_graphs_of_a_gpu_in_any_order_and_mode():
    """Results are read before the next graph is replayed, as the engine does."""
    backend = CudaBackend()
    inputs = [torch.zeros(count, 256, device=backend.device) for count in (1, 3, 2)]
    weight = torch.randn(256, 256, device=backend.device)

    def work(rows):
        return lambda: ((rows @ weight).relu() @ weight).sin()

    replays = []
    for number, rows in enumerate(inputs):
        with torch.inference_mode(number != 1):
            replays.append(backend.capture(work(rows)))
    for number in (2, 0, 1, 1, 0, 2):
        inputs[number].normal_()
        torch.testing.assert_close(replays[number](), work(inputs[number])())
    # Graphs beside it, as torch's own and the ones of other libraries are made.
    rows = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work(rows)()
    graph.replay()
    torch.testing.assert_close(found, work(rows)())
