"""Exporting: what the graph is held to, and that it appears whole or not at all."""

import random
import shutil
import sys

import onnx
import pytest
import torch
from torch.onnx._internal.exporter import _onnx_program

from minigpt4_runtime import image
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.graph_folder import ONNX_NAME, find_graph, read_record
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.export import onnx as export_module
from minigpt4_runtime.export import verify
from minigpt4_runtime.export.onnx import GraphPlan, export_onnx
from minigpt4_runtime.vision.registry import vision_encoder


@pytest.fixture
def cheap_export(graph_dir, monkeypatch):
    """Exports by copying a graph that was made before; all else is the real thing."""
    content = (graph_dir() / ONNX_NAME).read_bytes()
    monkeypatch.setattr(export_module, "_write_graph", lambda *_: _[-1].write_bytes(content))
    any_number = GraphPlan(batch_sizes=None)

    def export(out_dir, **options):
        return export_onnx(DEMO_MODEL_DIR, out_dir, images=[], plan=any_number, **options)

    return export


def pictures(count):
    lots = random.Random(5)
    return [
        image(scenes.draw(scenes.random_scene(lots, held_out=True), lots)) for _ in range(count)
    ]


def ends_of(path):
    graph = onnx.load(path, load_external_data=False).graph
    return [
        (each.name, each.type.tensor_type.elem_type, [
            side.dim_value or side.dim_param for side in each.type.tensor_type.shape.dim
        ])
        for each in (*graph.input, *graph.output)
    ]  # fmt: skip


def test_one_graph_from_pixels_to_rows_for_any_number_of_pictures(graph_dir):
    (pixels_name, pixels_type, pixels), (rows_name, rows_type, rows) = ends_of(
        graph_dir() / ONNX_NAME
    )
    assert (pixels_name, rows_name) == ("pixels", "rows")
    assert pixels_type == rows_type == onnx.TensorProto.FLOAT
    assert isinstance(pixels[0], str)
    assert pixels[1:] == [3, 96, 96]
    assert rows[1:] == [10, 160]
    assert (
        onnx.load(graph_dir() / ONNX_NAME).opset_import[0].version
        == read_record(graph_dir()).opset
        == 18
    )  # It is made for an .om as well.


@pytest.fixture(scope="module")
def half(golden_model_dir, tmp_path_factory):
    """A float16 graph for one picture, written as one that is too large for a single file."""
    out_dir = tmp_path_factory.mktemp("half") / "graph"
    plan = GraphPlan(dtype="float16", batch_sizes=(1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
        export_onnx(golden_model_dir("llama2"), out_dir, images=pictures(2), plan=plan)
    return out_dir


def test_float16_takes_float32_pixels_and_says_how_far_it_is(half):
    assert ends_of(half / ONNX_NAME) == [
        ("pixels", onnx.TensorProto.FLOAT, [1, 3, 56, 56]),
        ("rows", onnx.TensorProto.FLOAT16, [1, 4, 64]),
    ]
    assert onnx.load(half / ONNX_NAME, load_external_data=False).opset_import[0].version == 20
    check = read_record(half).check
    assert (check.num_pictures, check.num_random) == (2, 2)
    assert 1e-5 < check.largest_relative < 5e-3
    assert 1e-5 < check.largest_absolute != check.largest_relative


def test_weights_beyond_one_file_lie_beside_it(half, golden_model_dir, tmp_path):
    files = read_record(half).files
    assert sorted(files) == ["vision.onnx", "vision.onnx.data"]
    assert files["vision.onnx"] < 2**20 < files["vision.onnx.data"]
    graph = shutil.copytree(half, tmp_path / "moved")
    encoder = vision_encoder("onnx")(
        find_graph(graph, golden_model_dir("llama2")).path, (1,),
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    assert encoder.encode(torch.zeros(2, 3, 56, 56)).shape == (2, 4, 64)
    (graph / "vision.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"vision\.onnx\.data is missing"):
        find_graph(graph, golden_model_dir("llama2"))


def test_a_graph_that_differs_is_not_kept(cheap_export, tmp_path, monkeypatch):
    monkeypatch.setitem(verify.BOUNDS, "float32", 1e-9)
    with pytest.raises(CheckpointError, match=r"differ from torch's by .* at most 1e-09 is allow"):
        cheap_export(tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_numbers_are_not_kept(cheap_export, tmp_path, monkeypatch):
    run = verify._run
    monkeypatch.setattr(verify, "_run", lambda *_: run(*_) * float("nan"))
    with pytest.raises(CheckpointError, match="differ from torch's by nan"):
        cheap_export(tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(cheap_export, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "check_graph", stop)
    with pytest.raises(KeyboardInterrupt):
        cheap_export(tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_only_a_graph_folder_is_replaced_and_only_when_asked(cheap_export, tmp_path):
    cheap_export(tmp_path / "graph")
    with pytest.raises(CheckpointError, match=r"is a graph folder already\. .*--force"):
        cheap_export(tmp_path / "graph")
    cheap_export(tmp_path / "graph", force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(CheckpointError, match=r"not a graph folder \(it has no export\.json"):
        cheap_export(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "cat.png").exists()


def test_absent_packages_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendUnavailableError, match=r"onnxscript is not .*minigpt4-runtime\[onn"):
        export_onnx(tmp_path / "no model", tmp_path / "graph", images=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "a graph can be float32 or float16"),
        ({"batch_sizes": (0,)}, "must be different whole numbers"),
        ({"om_batch_sizes": (2, 2)}, "must be different whole numbers"),
        ({"om_batch_sizes": ()}, "must be different whole numbers"),
    ],
)
def test_plans_without_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GraphPlan(**settings)
