"""What every test may rely on."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"


def _why_not_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device on this machine"


def _why_not_npu() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    import torch
    import torch_npu  # noqa: F401

    return None if torch.npu.is_available() else "no Ascend device on this machine"


def _why_not_weights() -> str | None:
    if "MINIGPT4_WEIGHTS" in os.environ:
        return None
    return "MINIGPT4_WEIGHTS names no folder with published weights"


WHY_NOT = {"gpu": _why_not_gpu, "npu": _why_not_npu, "weights": _why_not_weights}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose mark asks for what this machine does not have, and say why."""
    for mark, why_not in WHY_NOT.items():
        if item.get_closest_marker(mark) and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def golden_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts a golden checkpoint once, in float32, and gives its model folder."""
    from minigpt4_runtime.checkpoint.convert import PublishedFiles, convert

    out_dir = tmp_path_factory.mktemp("models")

    @cache
    def convert_golden(name: str) -> Path:
        checkpoint = GOLDENS / name / "checkpoint"
        (projection,) = checkpoint.glob("pretrained_minigpt4*.pth")
        has_qformer = "llama2" not in projection.name
        files = PublishedFiles(
            language_dir=checkpoint / "llama",
            vision=checkpoint / "eva_vit_g.pth",
            projection=projection,
            qformer=checkpoint / "blip2_pretrained_flant5xxl.pth" if has_qformer else None,
            bert_dir=checkpoint / "bert-base-uncased" if has_qformer else None,
        )
        convert(files, out_dir / name, dtype="float32")
        return out_dir / name

    return convert_golden
