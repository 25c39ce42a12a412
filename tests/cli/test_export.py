"""`minigpt4 export vision`, and a graph in the commands that answer."""

import json

import ascend
import pytest

from minigpt4_runtime.checkpoint.graph_folder import ATC_NAME, OM_NAME, ONNX_NAME, RECORD_NAME
from minigpt4_runtime.export import onnx as export_module

OM = ("--format", "om", "--soc-version", ascend.SOC_VERSION)
COMMAND = (
    "atc --framework=5 --model=vision.onnx --output=vision --input_format=NCHW "
    "--input_shape=pixels:-1,3,96,96 --soc_version=Ascend910B3 --dynamic_batch_size=1,2,4"
)


@pytest.fixture
def cheap(graph_dir, monkeypatch):
    """The graph is copied, for any number of pictures; all else is the real thing."""
    content = (graph_dir() / ONNX_NAME).read_bytes()
    monkeypatch.setattr(export_module, "_write_graph", lambda *_: _[-1].write_bytes(content))


def test_export_then_describe(real_minigpt4, cheap, tmp_path):
    graph_dir = tmp_path / "graph"
    shown = real_minigpt4("export", "vision", "--out", graph_dir, "--batch", "dynamic")
    assert (shown.status, shown.out) == (0, f"{graph_dir}\n")
    assert "On 4 pictures and 2 random ones its rows differ" in shown.err
    assert f"Try it: minigpt4 describe PICTURE --vision-graph {graph_dir}" in shown.err
    record = json.loads((graph_dir / RECORD_NAME).read_text())
    assert record["batch_sizes"] is None
    described = real_minigpt4("describe", "examples/images", "--vision-graph", graph_dir)
    assert described.status == 0
    assert described.out == real_minigpt4("describe", "examples/images").out


def test_pictures_to_compare_on_can_be_named(real_minigpt4, cheap, tmp_path):
    pictures = ("--pictures", "examples/images", "--batch", "dynamic")
    shown = real_minigpt4("export", "vision", "--out", tmp_path / "g", *pictures)
    assert "On 4 pictures" in shown.err
    shown = real_minigpt4("export", "vision", "--out", tmp_path / "h", "--pictures", "no.png")
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.splitlines()[-1].startswith("error: no.png")
    assert not (tmp_path / "h").exists()


def test_without_atc_the_command_is_shown_and_written(real_minigpt4, cheap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "graph"
    shown = real_minigpt4("export", "vision", "--out", out, *OM, "--batch-sizes", "4,1,2")
    assert (shown.status, shown.out) == (3, f"{out}\n")
    assert shown.err.endswith(f"run {out / ATC_NAME}, which is:\n{COMMAND}\n")
    assert (out / ATC_NAME).read_text().endswith(f"exec {COMMAND}\n")
    assert sorted(path.name for path in out.iterdir()) == [ATC_NAME, RECORD_NAME, ONNX_NAME]


def test_with_atc_an_om_is_made_and_describes(real_minigpt4, cheap, tmp_path, monkeypatch):
    ascend.put_on_path(monkeypatch, ascend.install_atc(tmp_path / "bin"))
    ascend.install_ais_bench(monkeypatch)
    out = tmp_path / "graph"
    shown = real_minigpt4("export", "vision", "--out", out, *OM, "--batch-sizes", "1,2,4")
    assert shown.status == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [ATC_NAME, RECORD_NAME, OM_NAME, ONNX_NAME]
    options = ascend.read_options(out / OM_NAME)
    assert options["dynamic_batch_size"] == "1,2,4"
    described = real_minigpt4("describe", "examples/images", "--vision-graph", out)
    assert described.status == 0
    assert described.out == real_minigpt4("describe", "examples/images").out


def test_an_atc_that_fails_costs_nothing_that_was_made(real_minigpt4, cheap, tmp_path, monkeypatch):
    ascend.put_on_path(monkeypatch, ascend.install_atc(tmp_path / "bin", fails=True))
    out = tmp_path / "graph"
    shown = real_minigpt4("export", "vision", "--out", out, *OM, "--batch-sizes", "1,2")
    assert shown.status == 1
    assert (
        "error: atc ended with status 7 and made no vision.om (E40021: no such chip)" in shown.err
    )
    assert sorted(path.name for path in out.iterdir()) == [ATC_NAME, RECORD_NAME, ONNX_NAME]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--soc-version", "Ascend910B3"), "go with --format om"),
        (("--format", "om"), "needs --soc-version CHIP"),
        ((*OM, "--batch", "1"), "--batch goes with --format onnx"),
        ((*OM, "--batch-sizes", "1,x"), "must be whole numbers, as in 1,2,4,8"),
        ((*OM, "--batch-sizes", "0,1"), "must be different whole numbers"),
        (("--format", "om", "--soc-version", "910B3"), "as in Ascend910B3"),
        (("--model", "no model"), "no model"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(real_minigpt4, tmp_path, options, message):
    shown = real_minigpt4("export", "vision", "--out", tmp_path / "graph", *options)
    assert (shown.status, shown.out) == (1, "")
    assert message in shown.err.splitlines()[-1]
    assert not (tmp_path / "graph").exists()


def test_runtimes_are_chosen_by_name(real_minigpt4, graph_dir):
    picture, graph = "examples/images/one.png", graph_dir()
    chosen = ("--vision-graph", graph, "--vision-runtime")
    shown = real_minigpt4("describe", picture, *chosen, "onnx", "--provider", "cpu")
    assert shown.status == 0
    for runtime, message in (("om", "vision.om is not there"), ("torch", "runs no graph"),
                             ("tensorrt", "must be one of auto, torch, onnx, om")):  # fmt: skip
        shown = real_minigpt4("describe", picture, *chosen, runtime)
        assert shown.status == 1
        assert message in shown.err
