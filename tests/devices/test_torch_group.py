"""A group of one rank, over each library that this machine has: the calls that several make."""

import pytest
import torch

from minigpt4_runtime.devices.group import TorchGroup


@pytest.mark.parametrize(
    ("collective", "device"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.gpu)],
)
def test_one_rank_gets_its_own_rows_back(collective, device, tmp_path):
    group = TorchGroup(0, 1, folder=tmp_path)
    try:
        group.use(collective)
        rows = torch.arange(6.0, device=device).view(2, 3)
        assert torch.equal(group.sum(rows.clone()), rows)
        assert torch.equal(group.join(rows), rows)
        ids = torch.tensor([5, 7], device=device)
        assert group.spread(ids) is ids
        assert (ids.tolist(), group.least(3)) == ([5, 7], 3)
        assert group.traffic.num_calls == 4
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                captured = group.sum(rows.clone())
            graph.replay()
            assert torch.equal(captured, rows)
    finally:
        group.leave()
