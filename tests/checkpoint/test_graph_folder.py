"""Whose a graph is, and what is said where there is none."""

import json
import shutil

import pytest

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.graph_folder import (
    ATC_NAME,
    OM_NAME,
    ONNX_NAME,
    RECORD_NAME,
    find_graph,
    read_record,
    runtimes_of,
    vision_digest,
)
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.errors import CheckpointError


@pytest.fixture
def own_graph(graph_dir, tmp_path):
    """A graph folder of the demo model to be changed."""
    return shutil.copytree(graph_dir(), tmp_path / "graph")


@pytest.fixture
def other_model(tmp_path):
    """A copy of the demo model, and a way to change one byte of a weight."""
    model_dir = shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model")

    def change(name):
        stored = read_folder_weights(model_dir)[name]
        with stored.path.open("r+b") as file:
            file.seek(stored.start)
            (byte,) = file.read(1)
            file.seek(stored.start)
            file.write(bytes([byte ^ 1]))

    return model_dir, change


def test_the_record_reads_back(own_graph):
    record = read_record(own_graph)
    assert record.encode() == (own_graph / RECORD_NAME).read_text()
    assert record.vision_digest == vision_digest(DEMO_MODEL_DIR)
    assert record.check.largest_relative <= record.check.bound


def test_a_folder_or_a_file_in_it_names_the_graph(own_graph):
    for path in (own_graph, own_graph / ONNX_NAME):
        graph = find_graph(path, DEMO_MODEL_DIR)
        assert (graph.path, graph.runtime) == (own_graph / ONNX_NAME, "onnx")
        assert graph.batch_sizes is None
    (own_graph / OM_NAME).touch()
    graph = find_graph(own_graph, DEMO_MODEL_DIR)
    assert (graph.path, graph.runtime) == (own_graph / OM_NAME, "om")
    assert graph.batch_sizes == (1, 2, 4)
    assert find_graph(own_graph, DEMO_MODEL_DIR, runtime="onnx").runtime == "onnx"


@pytest.mark.parametrize("name", ["vicuna.onnx", "vicuna.om"])
def test_a_folder_may_end_as_a_graph_does(own_graph, name):
    folder = own_graph.rename(own_graph.with_name(name))
    assert find_graph(folder, DEMO_MODEL_DIR).path == folder / ONNX_NAME
    assert find_graph(folder / ONNX_NAME, DEMO_MODEL_DIR).path == folder / ONNX_NAME
    assert runtimes_of(folder) == ("onnx",)


@pytest.mark.parametrize("name", ["vision.projection.bias", "vision.vit.blocks.0.mlp_in.weight"])
def test_a_graph_of_other_weights_is_refused(own_graph, other_model, name):
    model_dir, change = other_model
    assert find_graph(own_graph, model_dir).runtime == "onnx"  # A copy is the same model.
    change(name)
    with pytest.raises(CheckpointError, match="was not made from the weights of"):
        find_graph(own_graph, model_dir)


def test_a_setting_of_the_image_side_counts_too(own_graph, other_model):
    model_dir, _ = other_model
    config = json.loads((model_dir / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was not made from the weights of"):
        find_graph(own_graph, model_dir)


def test_the_language_model_may_differ(own_graph, other_model):
    model_dir, change = other_model
    change("language.norm.weight")
    assert find_graph(own_graph, model_dir).runtime == "onnx"


def test_a_cut_or_missing_file_is_named(own_graph):
    content = (own_graph / ONNX_NAME).read_bytes()
    (own_graph / ONNX_NAME).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"vision\.onnx has .* instead of {len(content)}"):
        find_graph(own_graph, DEMO_MODEL_DIR)
    (own_graph / ONNX_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"vision\.onnx is missing\. Export again"):
        find_graph(own_graph, DEMO_MODEL_DIR)


def test_a_runtime_without_a_graph_is_named(own_graph):
    with pytest.raises(CheckpointError, match=r"vision\.om is not there\. Export with --format om"):
        find_graph(own_graph, DEMO_MODEL_DIR, runtime="om")
    (own_graph / ATC_NAME).touch()
    with pytest.raises(CheckpointError, match=r"Run .*atc\.sh on an Ascend host first"):
        find_graph(own_graph / OM_NAME, DEMO_MODEL_DIR)
    with pytest.raises(CheckpointError, match="is no graph for the runtime om"):
        find_graph(own_graph / ONNX_NAME, DEMO_MODEL_DIR, runtime="om")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not what `minigpt4 export vision` writes"),
        ('{"format_version": 1, "files": []}', "is not what `minigpt4 export vision` writes"),
        ('{"format_version": 99}', "is of format version 99 and this program reads up to 1"),
    ],
)
def test_a_damaged_record_is_named(own_graph, content, message):
    (own_graph / RECORD_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        find_graph(own_graph, DEMO_MODEL_DIR)


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a folder made by .*: it has no export\.json"):
        find_graph(tmp_path, DEMO_MODEL_DIR)
