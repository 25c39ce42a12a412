"""A group of one rank, over each library that this machine has: the calls that several make."""

import pytest
import torch

from minigpt4_runtime.devices.group import TorchGroup


def captured_rows(group, rows):
    """Their sum and their join, from a graph that is gone at the end: leaving a group waits for it.

    NCCL keeps what a graph has captured until no graph has it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = group.sum(rows.clone()), group.join(rows)
    graph.replay()
    copies = [each.clone() for each in found]
    torch.cuda.synchronize()
    return copies


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
            assert all(map(torch.equal, captured_rows(group, rows), (rows, rows)))
    finally:
        group.leave()
