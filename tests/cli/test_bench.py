"""`minigpt4 bench` on the demo model, with the smallest settings that still measure."""

import base64
import csv
import json
import re
import shutil
from dataclasses import replace

import pytest

from minigpt4_runtime.bench import ceilings, presets, vision
from minigpt4_runtime.bench.language import LanguageBench

LANGUAGE = ("bench", "language", "--device", "cpu", "--repeats", "2", "--pair", "12,6")
VISION = ("bench", "vision", "--device", "cpu", "--repeats", "2", "--batch-sizes", "1,2")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "SUMMED_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIDE", 64)
    ceilings.measure_ceilings.cache_clear()
    yield
    ceilings.measure_ceilings.cache_clear()


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def svg_text(path):
    """All that stands in a page's plots."""
    page = path.read_text(encoding="utf-8")
    plots = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    return "".join(base64.b64decode(plot).decode() for plot in plots)


def test_language_writes_the_same_points_for_every_reader(real_minigpt4, tmp_path):
    out = tmp_path / "report"
    shown = real_minigpt4(*LANGUAGE, "--pair", "20,4", "--batch-sizes", "1,3", "--out", out)
    assert shown.status == 0, shown.err
    assert "model: the demo model: image tower 5 × 160, language model 6 × 160" in shown.out
    assert "batch 3, 20 + 4 tokens: " in shown.err
    assert f"The report is in {out}/bench-language.html." in shown.err
    rows = read_csv(out / "bench-language.csv")
    assert list(rows[0])[:7] == [
        "batch_size", "input_length", "output_length", "response_time_ms", "first_token_ms",
        "per_token_ms", "tokens_per_second",
    ]  # fmt: skip
    shapes = [(row["batch_size"], row["input_length"], row["output_length"]) for row in rows]
    assert shapes == [("1", "12", "6"), ("3", "12", "6"), ("1", "20", "4"), ("3", "20", "4")]
    report = json.loads((out / "bench-language.json").read_text(encoding="utf-8"))
    assert [point["per_token_ms"] for point in report["points"]] == [
        float(row["per_token_ms"]) for row in rows
    ]
    assert report["facts"]["runs on"] == "cpu in float32"
    assert "--pair 20,4" in report["command"]
    assert "data:image/svg" in (out / "bench-language.html").read_text(encoding="utf-8")


def test_without_pairs_those_that_fit_are_measured(real_minigpt4, monkeypatch):
    asked = []
    measure = LanguageBench.measure

    def measure_shortened(self, work):
        asked.append((work.batch_size, work.input_length, work.output_length))
        return measure(self, replace(work, input_length=4, output_length=2))

    monkeypatch.setattr(LanguageBench, "measure", measure_shortened)
    shown = real_minigpt4("bench", "language", "--device", "cpu", "--repeats", "1")
    assert asked == [(1, 256, 64), (1, 512, 128)]
    left_out = "Left out: 3584 + 512 tokens do not fit into the model's context of 1024."
    assert left_out in shown.out


def test_where_no_pair_fits_one_is_asked_for(real_minigpt4, monkeypatch):
    monkeypatch.setattr(LanguageBench, "context", 300)
    shown = real_minigpt4("bench", "language", "--device", "cpu")
    assert (shown.status, shown.out) == (1, "")
    assert "context holds 300 tokens. Give a shorter --pair." in shown.err


def test_a_ramp_up_shows_every_point_and_its_end(real_minigpt4, tmp_path):
    limits = ("--batch-range", "2:5", "--max-token-latency-ms", "1e9")
    shown = real_minigpt4(*LANGUAGE, "--ramp-up", *limits, "--out", tmp_path)
    assert shown.status == 0, shown.err
    assert "the largest batch is 5; larger ones were not asked for (3 sizes tried)" in shown.out
    rows = read_csv(tmp_path / "bench-language.csv")
    assert [row["batch_size"] for row in rows] == ["2", "4", "5"]


def test_a_second_run_stands_beside_the_first(real_minigpt4, tmp_path):
    assert real_minigpt4(*LANGUAGE, "--out", tmp_path).status == 0
    shown = real_minigpt4(*LANGUAGE, "--compare", tmp_path / "bench-language.json")
    assert shown.status == 0, shown.err
    assert f"Beside {tmp_path}/bench-language.json" in shown.out
    assert "Different then" not in shown.out
    for name in ("response_time_ms", "first_token_ms", "per_token_ms"):
        assert name in shown.out


def test_vision_shows_cold_and_warm(real_minigpt4, tmp_path, folder):
    shown = real_minigpt4(*VISION, "--images", folder, "--out", tmp_path / "out")
    assert shown.status == 0, shown.err
    rows = read_csv(tmp_path / "out" / "bench-vision.csv")
    assert [(row["runtime"], row["start"], row["batch_size"]) for row in rows] == [
        ("torch", "cold", "1"), ("torch", "warm", "1"), ("torch", "warm", "2"),
    ]  # fmt: skip
    assert all(float(row["tower_ms"]) > 0 for row in rows)


def test_runtimes_stand_side_by_side(real_minigpt4, graph_dir, tmp_path):
    graph = shutil.copytree(graph_dir(), tmp_path / "graph")
    # As an Ascend host would have left it; here is nothing to run it.
    (graph / "vision.om").write_bytes(b"om")
    shown = real_minigpt4(*VISION, "--vision-graph", graph, "--out", tmp_path / "out")
    assert shown.status == 0, shown.err
    rows = read_csv(tmp_path / "out" / "bench-vision.csv")
    assert [row["runtime"] for row in rows] == ["torch"] * 3 + ["onnx"] * 3
    assert "onnx, warm, batch 2: " in shown.err
    assert "onnx, batch 2" in svg_text(tmp_path / "out" / "bench-vision.html")
    assert "Left out: om. " in shown.out
    alone = real_minigpt4(*VISION, "--vision-graph", graph, "--vision-runtime", "onnx")
    assert "onnx, warm, batch 2: " in alone.err
    assert "torch, warm" not in alone.err


def test_a_graph_that_is_not_there(real_minigpt4, tmp_path):
    shown = real_minigpt4(*VISION, "--vision-graph", tmp_path)
    assert shown.status == 1
    assert "holds no graph. Make one with `minigpt4 export vision`." in shown.err


def test_describe_grows_through_a_folder(real_minigpt4, tmp_path, bad_picture):
    shown = real_minigpt4(
        "bench", "describe", bad_picture.parent, "--device", "cpu", "--max-new-tokens", "3",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert shown.status == 1, "a picture failed"
    assert "broken off" not in shown.out
    rows = read_csv(tmp_path / "out" / "bench-describe.csv")
    assert [(row["num_images"], row["num_failed"]) for row in rows] == [
        ("1", "0"), ("2", "0"), ("3", "1"),
    ]  # fmt: skip
    assert shown.out.count("Not described: ") == 1
    assert "bad.png" in shown.out


@pytest.mark.parametrize("command", [LANGUAGE, VISION])
def test_a_folder_of_minigpt_v2_is_measured(real_minigpt4, golden_model_dir, command):
    folder = golden_model_dir("minigptv2")
    shown = real_minigpt4(*command, "--model", folder)
    assert shown.status == 0, shown.err
    assert f"model: {folder}" in shown.out


@pytest.mark.parametrize("command", [LANGUAGE, VISION])
def test_a_preset_needs_no_file(real_minigpt4, monkeypatch, command):
    from minigpt4_runtime import MiniGPT4

    # The real ones take seconds; what is tried here is the way from a name to numbers.
    monkeypatch.setitem(presets.PRESETS, "vicuna-7b", MiniGPT4.load(device="cpu").config)
    shown = real_minigpt4(*command, "--preset", "vicuna-7b", "--random-weights", "--layers", "2")
    assert shown.status == 0, shown.err
    layers = (1, 2) if "language" in command else (2, 1)
    assert (
        "model: vicuna-7b with random weights, 2 layers: image tower {} × 160, language model "
        "{} × 160".format(*layers)
    ) in shown.out


def test_what_was_measured_before_a_stop_is_reported(real_minigpt4, tmp_path, monkeypatch):

    def stop_at_the_second(model, batch, encode=vision._encode):
        if len(batch) == 2:
            raise KeyboardInterrupt
        return encode(model, batch)

    monkeypatch.setattr(vision, "_encode", stop_at_the_second)
    shown = real_minigpt4(*VISION, "--out", tmp_path)
    assert shown.status == 130
    assert "The run was broken off here" in shown.out
    assert len(read_csv(tmp_path / "bench-vision.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("language", "--pair", "256"), "--pair is '256'; give tokens of prompt and answer: 256"),
        (("language", "--pair", "0,4"), "--pair is '0,4'"),
        (("language", "--pair", "1000,25"), "1000 + 25 tokens do not fit into the model's context"),
        (("language", "--batch-sizes", "1,x"), "--batch-sizes is '1,x'; give whole numbers"),
        (("language", "--batch-range", "1:4"), "belong to --ramp-up. Add it."),
        (("language", "--ramp-up", "--batch-sizes", "7,9"), "--batch-range: drop --batch-sizes."),
        (("language", "--ramp-up", "--batch-range", "9:4"), "--batch-range is '9:4'"),
        (("language", "--ramp-up", "--max-token-latency-ms", "0"), "is 0; it must be above 0"),
        (("language", "--ramp-up", "--max-token-latency-ms", "nan"), "is nan; it must be above 0"),
        (("language", "--layers", "2"), "belong to --preset NAME"),
        (("vision", "--random-weights"), "belong to --preset NAME"),
        (("vision", "--preset", "vicuna-7b"), "Add --random-weights"),
        (("vision", "--preset", "x", "--random-weights"), "known are vicuna-7b, vicuna-13b"),
        (("vision", "--preset", "x", "--model", "."), "give one of them"),
        (("vision", "--images", "no.png"), "no.png does not exist"),
        (("language", "--compare", "no.json"), "no.json cannot be read"),
        (("language", "--out", "no/where"), "there is no folder no"),
        (("describe", "nowhere"), "nowhere is no folder"),
        (("describe", "."), "There are no pictures in the folder .. Name another folder."),
    ],
)
def test_what_cannot_be_is_one_sentence(real_minigpt4, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shown = real_minigpt4("bench", *arguments)
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_help_names_the_three(real_minigpt4):
    shown = real_minigpt4("bench", "--help")
    for name in ("vision", "language", "describe"):
        assert name in shown.out
    assert real_minigpt4("bench", "language", "--repeats", "0").status == 2
