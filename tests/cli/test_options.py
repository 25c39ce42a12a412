"""What the commands set up around a model."""

import pytest
import torch

from minigpt4_runtime.cli.options import ModelOptions


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("is_demo", "wish", "threads"), [(True, None, 1), (True, "2", 2), (False, None, 2)]
)
def test_the_demo_model_takes_one_thread_unless_told(
    is_demo, wish, threads, monkeypatch, golden_model_dir
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    where = ModelOptions(model=None if is_demo else golden_model_dir("llama2"), device="cpu")
    where.load(announce_demo=False).close()
    assert torch.get_num_threads() == threads
