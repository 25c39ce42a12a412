"""What every test may rely on."""

import gc
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Models here are tiny: a second thread costs more than it gives. Read when torch is first loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where there is no GPU, Triton runs kernels on the CPU if this is set before it is first imported,
# as torch's flop counter does.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in the background with Ctrl-C ignored, and so would be what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests write need not survive a power cut, and a busy disk makes them wait for that.
os.fsync = lambda descriptor: None

# Nothing that collecting tests makes is garbage: looking for it would take a quarter of that time.
gc.disable()

GOLDENS = Path(__file__).parent / "goldens"

# They take longest and come first: a worker that began one last would end long after the others.
LONGEST_FILES = (
    "test_ranks.py", "test_parity.py", "test_gpu_run.py", "test_linear_triton.py",
    "test_quantise.py", "test_cache_window.py", "test_cache_formats.py", "test_attention.py",
    "test_fetch.py", "test_graphs_together.py", "test_process.py", "test_convert.py",
    "test_onnx.py", "test_page_process.py", "test_page_turns.py", "test_load.py",
    "test_schema.py", "test_chat_page.py", "test_main.py", "test_calibrate.py",
    "test_batching.py", "test_demo_model.py", "test_adapters_together.py",
    "test_long_sequences.py", "test_quantised_cache.py", "test_describe.py", "test_evaluate.py",
    "test_page_kept.py", "test_page_settings.py", "test_bench.py", "test_vision.py",
)  # fmt: skip


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


def _why_not_ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "Ray is not installed: make test-ray"


def _why_not_vllm() -> str | None:
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed: make test-vllm"


WHY_NOT = {
    "gpu": _why_not_gpu, "npu": _why_not_npu, "ray": _why_not_ray, "vllm": _why_not_vllm,
    "weights": _why_not_weights,
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)  # Some environments have no xdist.
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: tests also wait, for programs, browsers and sockets."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest come first; all else keeps its order."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what was there before the first test."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose mark asks for what this machine does not have, and say why."""
    for mark, why_not in WHY_NOT.items():
        if item.get_closest_marker(mark) and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def tls_once() -> Iterator[None]:
    """Lets HTTP clients share what they need for TLS: each would read all certificates anew."""
    from httpx._transports import default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        yield


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of fetched models, and none of this machine's tokens, mirrors and proxies."""
    proxies = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", *proxies):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def web(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The published hosts on loopback, with the Vicuna golden under the published names."""
    from published_web import golden_files, start_web

    # Read from HF_HOME when the library was first loaded.
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache_home / "no-token"))
    web, end = start_web(golden_files("vicuna"))
    monkeypatch.setenv("HF_ENDPOINT", web.site)
    yield web
    end()


@pytest.fixture(scope="session")
def golden_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts a golden checkpoint once, as a user would, and gives its model folder."""
    from minigpt4_runtime.convert.convert import PublishedFiles, convert

    out_dir = tmp_path_factory.mktemp("models")

    @cache
    def convert_golden(name: str) -> Path:
        checkpoint = GOLDENS / name / "checkpoint"
        (projection,) = checkpoint.glob("*minigpt*.pth")
        cases = json.loads((GOLDENS / name / "cases.json").read_text(encoding="utf-8"))
        has_qformer = cases["variant"] == "vicuna"
        files = PublishedFiles(
            language_dir=checkpoint / "llama",
            vision=checkpoint / "eva_vit_g.pth",
            projection=projection,
            qformer=checkpoint / "blip2_pretrained_flant5xxl.pth" if has_qformer else None,
            bert_dir=checkpoint / "bert-base-uncased" if has_qformer else None,
        )
        # MiniGPT-v2's file says for which size it was trained.
        image_size = None if cases["variant"] == "minigptv2" else cases["dims"]["image"]
        convert(files, out_dir / name, image_size=image_size)
        return out_dir / name

    return convert_golden


@pytest.fixture(scope="session")
def graph_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports the image side of a model folder once, for any number of pictures; None is the demo.

    The graphs are shared, by all processes that run tests: copy one before you change it.
    """
    from filelock import FileLock

    from minigpt4_runtime.api import DEMO_MODEL_DIR
    from minigpt4_runtime.export.onnx import GraphPlan, export_onnx

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"

    @cache
    def export(model_dir: Path | None = None) -> Path:
        model_dir = model_dir or DEMO_MODEL_DIR
        graph = shared / model_dir.name
        shared.mkdir(exist_ok=True)
        with FileLock(shared / f"{model_dir.name}.lock"):
            if not graph.exists():
                plan = GraphPlan(batch_sizes=None, om_batch_sizes=(1, 2, 4))
                export_onnx(model_dir, graph, images=[], plan=plan)
        return graph

    return export


@pytest.fixture(params=["llama2", "vicuna"])
def variant(request: pytest.FixtureRequest) -> str:
    """Each of the published variants."""
    return str(request.param)


@pytest.fixture
def published(variant: str) -> Any:
    """The golden checkpoint of a variant. Do not change it."""
    from published_files import files_of

    return files_of(variant, GOLDENS / variant / "checkpoint")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a.png, b.jpg, bad.png (no picture), notes.txt and sub/c.png."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg", "sub/c.png", ".hidden.png", ".cache/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path
