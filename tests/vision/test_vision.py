"""The contract of a vision encoder, held by every runtime: the rows that torch gives."""

import shutil
import sys
import types

import ascend
import onnx
import pytest
import torch
from fake_graphs import Recorder
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import OM_NAME, ONNX_NAME
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.config import VisionSettings
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.export.om import atc_command, compile_om
from minigpt4_runtime.vision.graph import cut_batches
from minigpt4_runtime.vision.registry import VISION_RUNTIMES, vision_encoder
from minigpt4_runtime.vision.torch import TorchVisionEncoder

CPU = torch.device("cpu")
CONFIG = load_config(DEMO_MODEL_DIR)
CASES = ["torch", "onnx", "onnx-single", "om", "om-single"]


def take_one_at_a_time(graph):
    """Make of a graph for any number of pictures one for a single picture."""
    content = onnx.load(graph / ONNX_NAME)
    for end in (*content.graph.input, *content.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(content, graph / ONNX_NAME)


@pytest.fixture(params=CASES)
def open_encoder(request, graph_dir, tmp_path, monkeypatch):
    """Opens the demo model's encoder in one of the runtimes."""
    runtime, _, single = request.param.partition("-")
    if runtime == "torch":
        vision = load_vision(DEMO_MODEL_DIR, dtype=torch.float32)
        return lambda dtype=torch.float32: TorchVisionEncoder(vision.to(dtype), in_float32=True)
    graph = shutil.copytree(graph_dir(), tmp_path / "graph")
    sizes = (1,) if single else (1, 2, 4)
    if single:
        take_one_at_a_time(graph)
    if runtime == "onnx":
        path, sizes = graph / ONNX_NAME, sizes if single else None
    else:
        ascend.put_on_path(monkeypatch, ascend.install_atc(tmp_path / "bin"))
        ascend.install_ais_bench(monkeypatch)
        command = atc_command(CONFIG.vision, soc_version=ascend.SOC_VERSION, batch_sizes=sizes)
        assert compile_om(graph, command)
        path = graph / OM_NAME
    return lambda dtype=torch.float32: vision_encoder(runtime)(path, sizes, device=CPU, dtype=dtype)


def pictures(count):
    side = CONFIG.vision.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def true_rows(pixels):
    return load_vision(DEMO_MODEL_DIR, dtype=torch.float32)(pixels)


def assert_near(rows, truth, share):
    assert rows.shape == truth.shape == (len(truth), 10, CONFIG.language.hidden_size)
    assert float((rows - truth).abs().max()) <= share * float(truth.abs().max())


def test_rows_are_torch_s_for_any_number_of_pictures(open_encoder):
    encoder = open_encoder()
    for count in (1, 2, 7):
        pixels = pictures(count)
        assert_near(encoder.encode(pixels), true_rows(pixels), 1e-5)


def test_pixels_may_lie_crosswise(open_encoder):
    pixels = pictures(2)
    crosswise = pixels.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert_near(open_encoder().encode(crosswise), true_rows(pixels), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_have_the_language_model_s_dtype(open_encoder, dtype):
    pixels = pictures(1)
    rows = open_encoder(dtype).encode(pixels)
    assert rows.dtype == dtype
    assert_near(rows.float(), true_rows(pixels), 4 * torch.finfo(dtype).eps)


# --- graphs of a device -------------------------------------------------------------------------


def test_rows_from_graphs_are_the_same_for_any_number_of_pictures():
    recorder = Recorder()
    vision = load_vision(DEMO_MODEL_DIR, dtype=torch.float32)
    encoder = TorchVisionEncoder(vision, capture=recorder.capture)
    before = encoder.encode(pictures(3))
    for count, num_captured in ((4, 1), (1, 2), (10, 4), (7, 4)):
        assert_near(encoder.encode(pictures(count)), true_rows(pictures(count)), 1e-5)
        assert recorder.num_captured == num_captured
    assert_near(before, true_rows(pictures(3)), 1e-5)


def test_a_caller_between_tower_and_projection_has_no_graph():
    recorder, stages = Recorder(), []
    vision = load_vision(DEMO_MODEL_DIR, dtype=torch.float32)
    encoder = TorchVisionEncoder(vision, capture=recorder.capture)
    rows = encoder.encode(pictures(1), lambda: stages.append("tower"))
    assert_near(rows, true_rows(pictures(1)), 1e-5)
    assert (stages, recorder.num_captured) == (["tower"], 0)


def test_pictures_go_on_where_a_capture_fails(caplog):
    recorder = Recorder()
    recorder.trouble = RuntimeError("operation not permitted")
    vision = load_vision(DEMO_MODEL_DIR, dtype=torch.float32)
    encoder = TorchVisionEncoder(vision, capture=recorder.capture)
    for count in (1, 3, 9):
        assert_near(encoder.encode(pictures(count)), true_rows(pictures(count)), 1e-5)
    (record,) = caplog.records
    assert "1 pictures could not be captured as a graph (operation not" in record.getMessage()


# --- batches -----------------------------------------------------------------------------------


@given(st.integers(1, 50), st.sets(st.integers(1, 16), min_size=1))
def test_batches_hold_all_pictures_and_only_the_last_is_not_full(count, sizes):
    batches = list(cut_batches(count, tuple(sizes)))
    assert set(batches) <= sizes
    assert sum(batches[:-1]) < count <= sum(batches)
    assert sum(batches) - count < min(sizes)


def test_a_batch_that_is_not_full_gives_no_rows_too_many(graph_dir):
    path = graph_dir() / ONNX_NAME
    encoder = vision_encoder("onnx")(path, (4,), device=CPU, dtype=torch.float32)
    pixels = pictures(6)
    assert_near(encoder.encode(pixels), true_rows(pixels), 1e-5)


# --- what can be chosen ------------------------------------------------------------------------


def test_the_table_and_the_setting_know_the_same_names():
    with pytest.raises(ConfigError, match=f"one of auto, {', '.join(VISION_RUNTIMES)}"):
        VisionSettings(runtime="tensorrt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "onnx"}, "needs a graph"),
        ({"runtime": "om"}, "needs a graph"),
        ({"runtime": "torch", "graph": "somewhere"}, "runs no graph"),
        ({"provider": "cpu"}, "no graph to run on it"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VisionSettings(**settings)


def open_onnx(path, **options):
    return vision_encoder("onnx")(path, None, device=CPU, dtype=torch.float32, **options)


def test_a_provider_is_chosen_by_name(graph_dir):
    path = graph_dir() / ONNX_NAME
    assert open_onnx(path, provider="cpu").encode(pictures(1)).shape == (1, 10, 160)
    with pytest.raises(ConfigError, match="must be one of cuda, cann, openvino, cpu"):
        open_onnx(path, provider="gpu")
    with pytest.raises(BackendUnavailableError, match=r"no provider cann; it has .*cpu"):
        open_onnx(path, provider="cann")


class FakeOnnxRuntime(types.ModuleType):
    """Has CUDA, which starts or does not; notes what a session was asked to run on."""

    SessionOptions = types.SimpleNamespace

    def __init__(self, starts):
        super().__init__("onnxruntime")
        self.starts, self.asked = starts, []

    def get_available_providers(self):
        return ["CPUExecutionProvider", "CUDAExecutionProvider"]

    def InferenceSession(self, path, options, providers):
        self.asked.append(providers)
        names = [each if isinstance(each, str) else each[0] for each in providers]
        return types.SimpleNamespace(
            get_providers=lambda: names if self.starts else names[1:],
            get_inputs=lambda: [types.SimpleNamespace(name="pixels")],
        )


def test_the_first_provider_there_is_runs_on_the_model_s_device(monkeypatch):
    fake = FakeOnnxRuntime(starts=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    device = torch.device("cuda", 1)
    vision_encoder("onnx")("vision.onnx", None, device=device, dtype=torch.float16)
    cuda = ("CUDAExecutionProvider", {"device_id": "1"})
    assert fake.asked == [[cuda, "CPUExecutionProvider"]]


def test_a_provider_that_does_not_start_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntime(starts=False))
    with pytest.raises(BackendUnavailableError, match="has CUDAExecutionProvider but cannot start"):
        open_onnx("vision.onnx")


def test_absent_packages_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"minigpt4-runtime\[onnx\]"):
        open_onnx("vision.onnx")
    with pytest.raises(BackendUnavailableError, match=r"ais_bench.* is not installed"):
        vision_encoder("om")("vision.om", None, device=CPU, dtype=torch.float32)
    with pytest.raises(ConfigError, match="only the runtime onnx has providers"):
        vision_encoder("om")("a.om", None, device=CPU, dtype=torch.float32, provider="cpu")


def test_a_broken_graph_is_said(tmp_path):
    (tmp_path / ONNX_NAME).write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"cannot open .*vision\.onnx.*Export again"):
        open_onnx(tmp_path / ONNX_NAME)
