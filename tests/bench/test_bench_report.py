"""What a run came to, as text, CSV, JSON and a page; and beside an older one."""

import json
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from minigpt4_runtime import ConfigError
from minigpt4_runtime.bench import plots
from minigpt4_runtime.bench.ceilings import Ceilings
from minigpt4_runtime.bench.comparison import Change, compare, read_report
from minigpt4_runtime.bench.describe import DescribedFolder, DescribePoint
from minigpt4_runtime.bench.language import BatchSearch, LanguagePoint, Tried
from minigpt4_runtime.bench.ramp_up import RampUp
from minigpt4_runtime.bench.report import BenchRun
from minigpt4_runtime.bench.spread import Measured
from minigpt4_runtime.bench.vision import VisionPoint

FACTS = {"model": "the demo model", "runs on": "cpu in float32"}


def language_point(batch_size=1, per_token_ms=10.0, **fields):
    return LanguagePoint(
        batch_size=batch_size, input_length=256, output_length=64, response_time_ms=1000.0,
        first_token_ms=100.0, per_token_ms=per_token_ms, tokens_per_second=64.0,
        per_token_p50_ms=9.0, per_token_p90_ms=11.0, per_token_p99_ms=12.0,
        decode_tokens_per_second=70.0, gigabytes_per_second=20.0, bandwidth_share=0.5,
        peak_memory_bytes=2**30, **fields,
    )  # fmt: skip


def tried(batch_size=1, per_token_ms=10.0, verdict="holds", values=(9.9, 10.0, 10.3)):
    return Tried(language_point(batch_size, per_token_ms), {"per_token_ms": list(values)}, verdict)


def out_of_memory(batch_size):
    point = LanguagePoint(
        batch_size=batch_size, input_length=256, output_length=64, failure="out of memory: 9 GiB."
    )
    return Tried(point, {}, "memory")


def report(kind="bench language", measured=None, **fields):
    measured = measured or [tried()]
    return BenchRun(kind, "minigpt4 …", FACTS, Ceilings(40.0, 200.0), tuple(measured), **fields)


def vision_point(**fields):
    return VisionPoint(
        runtime="torch", batch_size=2, start="warm", latency_ms=20.0, latency_p50_ms=20.0,
        latency_p90_ms=21.0, latency_p99_ms=22.0, images_per_second=50.0, decode_ms=4.0,
        preprocess_ms=1.0, tower_ms=14.0, projection_ms=1.0, encode_ms=15.0,
        gigaflops_per_second=100.0, ceiling_share=0.5, load_ms=None, peak_memory_bytes=None,
    )  # fmt: skip


def describe_point(num_images=4):
    return DescribePoint(
        num_images=num_images, num_failed=1, seconds=2.0, images_per_second=1.5,
        tokens_per_second=60.0, ms_per_image=666.7, tokens_per_image=40.0,
        peak_memory_bytes=3 * 2**30,
    )  # fmt: skip


SEARCH = BatchSearch(
    256, 64, 50.0,
    RampUp(2, "memory", {1: tried(1), 2: tried(2), 4: out_of_memory(4), 3: out_of_memory(3)}),
)  # fmt: skip


def test_csv_columns_of_the_language_bench():
    first, row, _ = report().as_rows().as_csv().split("\n")
    assert first == (
        "batch_size,input_length,output_length,response_time_ms,first_token_ms,per_token_ms,"
        "tokens_per_second,per_token_p50_ms,per_token_p90_ms,per_token_p99_ms,"
        "decode_tokens_per_second,gigabytes_per_second,bandwidth_share,peak_memory_bytes,failure"
    )
    assert row == "1,256,64,1000.0,100.0,10.0,64.0,9.0,11.0,12.0,70.0,20.0,0.5,1073741824,"


def test_the_terminal_shows_facts_numbers_and_ceilings():
    text = report(measured=[tried(), out_of_memory(8)], notes=("Left out: something.",)).as_text()
    assert text.startswith("model: the demo model\nruns on: cpu in float32\n\nbatch  input")
    table = [line.split() for line in text.splitlines()]
    assert ["8", "256", "64", *["–"] * 11] in table
    assert "1000.0" in text
    assert " 50%  " in text
    assert "40.0 GB/s read, 200 GFLOP/s in a matrix product." in text
    assert "Left out: something." in text


def test_json_holds_everything():
    mapping = report(searches=(SEARCH,)).as_mapping()
    assert json.loads(json.dumps(mapping)) == mapping
    assert (mapping["report"], mapping["format_version"]) == ("bench language", 1)
    assert mapping["points"][0]["tries"] == {"per_token_ms": [9.9, 10.0, 10.3]}
    assert mapping["points"][0]["per_token_ms"] == 10.0
    assert mapping["searches"][0]["limit"] == "memory"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (RampUp(2, "latency", {1: tried(1)}), "largest batch is 2; the next larger one is too"),
        (RampUp(2, "range", {1: tried(1)}), "largest batch is 2; larger ones were not asked for"),
        (RampUp(None, "latency", {4: tried(4)}), "no batch holds; already 4 is too slow."),
        (RampUp(None, "memory", {4: tried(4)}), "no batch holds; already 4 is out of memory."),
    ],
)
def test_a_search_ends_in_a_sentence(found, sentence):
    assert sentence in BatchSearch(256, 64, 50.0, found).as_text()


@pytest.mark.parametrize(
    ("kind", "measured", "searches", "num_plots"),
    [
        ("bench language", [tried(1), tried(4)], (), 3),
        ("bench language", list(SEARCH.found.tried.values()), (SEARCH,), 3),
        ("bench language", [out_of_memory(4)], (), 0),
        (
            "bench vision",
            [
                Measured(replace(vision_point(), start="cold", load_ms=100.0), {}),
                Measured(vision_point(), {"latency_ms": [20.0]}),
            ],
            (),
            4,
        ),
        (
            "bench describe",
            [DescribedFolder(describe_point(n), {"seconds": [2.0]}) for n in (1, 2)],
            (),
            2,
        ),
    ],
)
def test_the_page_is_complete_in_itself(kind, measured, searches, num_plots):
    page = report(kind, measured, searches=searches, notes=("A < B",)).as_page()
    assert page.count("data:image/svg+xml") == 2 * num_plots  # One for light, one for dark.
    assert "A &lt; B" in page
    assert "the demo model" in page
    assert not {"<script", 'src="http', 'href="http'} & set(page.split())


def test_with_one_batch_size_a_point_still_tells_which_rate_it_is(monkeypatch):
    painters = []
    monkeypatch.setattr(plots, "draw", lambda _caption, paint: painters.append(paint))
    plots.draw_plots(report("bench language", [tried(1)]))
    axes = Figure().add_subplot()
    painters[0](axes)
    assert len({str(line.get_markerfacecolor()) for line in axes.lines}) == 2


def test_a_compiled_graph_is_drawn_as_one_stage():
    point = replace(vision_point(), tower_ms=None, projection_ms=None)
    assert "data:image/svg" in report("bench vision", [Measured(point, {})]).as_page()


# --- beside an older report -----------------------------------------------------------------


def damaged(tries):
    """A report whose only point has these tries."""
    point = f'{{"batch_size": 1, "input_length": 2, "output_length": 3, "tries": {{"a": {tries}}}}}'
    return f'{{"report": "bench language", "facts": {{}}, "points": [{point}]}}'


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.json"
    mapping = report(measured=[tried(1, values=[19.0, 20.0, 21.0]), tried(7)]).as_mapping()
    path.write_text(json.dumps(mapping), encoding="utf-8")
    return read_report(path, "bench language")


def test_a_change_stands_beside_the_noise_of_both(old):
    facts = {**FACTS, "runs on": "cuda in float16"}
    comparison = compare(old, [tried(1, values=[9.0, 10.0, 10.0]), tried(2)], facts)
    (change,) = comparison.changes
    assert change == Change(("1", "256", "64"), "per_token_ms", 20.0, 10.0, 0.05, 0.05)
    assert (change.change, change.verdict) == (-0.5, "faster")
    assert comparison.differences == ("runs on: cpu in float32 then, cuda in float16 now",)
    table = report(comparison=comparison).as_text()
    assert "-50.0%" in table
    assert "Different then: runs on: cpu in float32 then, cuda in float16 now." in table


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([21.0, 22.0, 22.0], "slower"), ([20.0, 21.0, 22.0], "within noise"),
     ([20.0], "one try: noise unknown")],
)  # fmt: skip
def test_only_more_than_noise_is_a_change(old, values, verdict):
    (change,) = compare(old, [tried(1, values=values)], FACTS).changes
    assert change.verdict == verdict


def test_where_nothing_is_shared_that_is_said(old):
    comparison = compare(old, [tried(3)], FACTS)
    assert comparison.changes == ()
    assert "old.json was measured here too." in report(comparison=comparison).as_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no report; this is bench language"),
        ('{"report": "bench vision"}', "is a report of bench vision; this is bench language"),
        ('{"report": "bench language"}', "is damaged"),
        ('{"report": "bench language", "points": [{}], "facts": {}}', "is damaged"),
        (damaged("[]"), "is damaged"),
        (damaged("[0]"), "is damaged"),
        (damaged('["x"]'), "is damaged"),
    ],
)
def test_what_is_no_older_report_is_refused(tmp_path, content, message):
    path = tmp_path / "old.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_report(path, "bench language")


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"old\.json cannot be read"):
        read_report(tmp_path / "old.json", "bench language")
