"""The script for a machine with a GPU: all of it runs on a CPU, and no part hides another."""

import importlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.engine import graphs

CHECKOUT = Path(__file__).parents[2]
# What a CPU has not, by its part and name.
ONLY_ON_A_GPU = {
    ("facts", "graphs"), ("facts", "overlap"),
    ("fallback", "by torch alone"),
    *(
        ("compiled", f"graph{way}, {layers} layers, 1")
        for way in ("", " without overlap") for layers in (8, 32)
    ),
    *(
        ("attention", f"ids, 2 {what}, one launch") for what in ("best", "drawn", "drawn, top-p")
    ),
    ("products", "torch's 2:4 float16, 128 × 64, 16 rows"),
    ("products", "torch's 2:4 int8, 128 × 64, 16 rows"),
    *(
        ("attention", f"turn and cache, 2 of {name}, one launch")
        for name in ("float16", "int8", "int4", "fp8")
    ),
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    monkeypatch.syspath_prepend(CHECKOUT / "scripts")


# The parts one after the other in one process, which imports their libraries once.
IN_ONE_PROCESS = """
import sys
import gpu
import gpu_parts

def run_part(part, out_dir, limit_seconds, env):
    sys.argv = list(part.command[1:])
    try:
        gpu_parts.main()
    except SystemExit as ending:
        return gpu.Outcome("failed" if ending.code else "done", 0.0, limit_seconds)

gpu.run_part = run_part
gpu.main()
"""


def run_dry(out_dir, *program):
    """The output of a dry run."""
    command = [sys.executable, *program, "--dry-run", "--out", str(out_dir)]
    done = subprocess.run(
        command, cwd=CHECKOUT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A dry run's folder and its output."""
    out_dir = tmp_path_factory.mktemp("gpu")
    return out_dir, run_dry(out_dir, "-c", IN_ONE_PROCESS)


def run_plan(gpu, parts, out_dir, minutes=5.0):
    record = {"minutes": minutes}
    gpu.run_plan(parts, out_dir, record, {})
    return record


def python(name, limit_seconds, code):
    import gpu

    return gpu.Part(name, limit_seconds, (sys.executable, "-c", code))


def test_a_dry_run_executes_every_part(dry_run, scripts):
    import gpu

    out_dir, output = dry_run
    record = json.loads((out_dir / "run.json").read_text("utf-8"))
    assert list(record["parts"]) == [part.name for part in gpu.PLAN]
    results = {
        (part, each["name"]): each
        for part in record["parts"]
        for each in json.loads((out_dir / f"{part}.json").read_text("utf-8"))
    }
    assert {key for key, each in results.items() if "unavailable" in each} == ONLY_ON_A_GPU
    assert not [each for each in results.values() if "error" in each]
    assert results["kernels", "pytest -m gpu tests/kernels"]["skipped"] > 100
    assert results["language", "decode4, agreement"]["tokens"] == 6
    assert results["language", "decode4, without graphs"]["rates"]
    for what in ("8 layers, 1", "image side, 1"):
        assert results["compiled", f"torch.compile, {what}"]["difference"] < 1e-3
    assert next(name for part, name in results if part == "rival") == "decode4"
    assert results["tuning", "w4a16-g128, 4 × 256, recomputed"]["tokens_per_second"] > 0
    assert len(results["profile", "one picture"]["kernels"]) > 5
    assert "done" in output
    assert "FAILED" not in output


def test_without_a_rate_of_our_own_the_language_part_is_measured_by_torch_alone(
    scripts, tmp_path, monkeypatch
):
    import gpu_speed
    from gpu_results import Results, Setting

    from minigpt4_runtime.devices import cuda
    from minigpt4_runtime.kernels import registry

    for module in (cuda, registry):  # As they are put back afterwards.
        monkeypatch.setattr(module, "runs_triton", lambda capability: True)
    lost = [{"name": "decode1", "error": "a kernel"}, {"name": "x, transformers", "rates": [1]}]
    (tmp_path / "language.json").write_text(json.dumps(lost), "utf-8")
    gpu_speed.fallback(Setting(is_dry=True), Results(tmp_path / "fallback.json"))
    found = json.loads((tmp_path / "fallback.json").read_text("utf-8"))
    assert {each["name"] for each in found} == {
        f"{work}, by torch alone, graphs {graphs}"
        for work in ("decode1", "decode4", "prefill") for graphs in ("auto", "off")
    }  # fmt: skip
    assert all(each["rates"] for each in found)
    assert not registry.runs_triton((9, 0))


def test_answers_about_pictures_count_the_tokens_that_came(scripts, monkeypatch):
    """An answer that ended early would otherwise make the rate look higher than it is."""
    import gpu_speed
    from gpu_results import Setting

    def submit(messages, sampling):
        assert sampling.stop == (), "random weights may say a template's stop"
        reply = SimpleNamespace(token_ids=(5,) * (sampling.max_new_tokens - 1))
        return iter([SimpleNamespace(reply=None), SimpleNamespace(reply=reply)])

    clock = itertools.count()
    monkeypatch.setattr(gpu_speed.time, "perf_counter", lambda: next(clock))
    found = gpu_speed.many_answers(SimpleNamespace(submit=submit), Setting(is_dry=True))
    assert found == {"answers": 2, "tokens_per_second": 4.0}


def test_files_are_read_whole_and_once_for_their_rate(scripts, tmp_path, monkeypatch):
    """By as many threads as load a model: by one, loading would look as fast as the files."""
    import gpu_whole

    clock, sizes = itertools.count(), (5 * 2**20 + 3, 7)
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes(size))
    monkeypatch.setattr(gpu_whole.time, "perf_counter", lambda: next(clock))
    assert gpu_whole.file_rate(tmp_path, 4) == {"gigabytes_per_second": sum(sizes) / 1e9}
    whole = tmp_path / "0.safetensors"
    shares = [gpu_whole.read_share(whole, number, 4) for number in range(4)]
    assert max(shares) - min(shares) <= 1


def test_a_part_runs_as_a_process_of_its_own(tmp_path):
    output = run_dry(tmp_path, "gpu.py", "--only", "facts")
    assert "facts: done" in output
    assert "copy: " in (tmp_path / "facts.log").read_text("utf-8")
    (part,) = json.loads((tmp_path / "run.json").read_text("utf-8"))["parts"]
    assert part == "facts"


def test_the_report_has_every_table(dry_run):
    command = [sys.executable, "scripts/gpu_report.py", str(dry_run[0])]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for title in ("Ceilings", "Tests", "Exact answers", "Language model", "Attention",
                  "Keys and values", "Choice of ids", "Products", "Quantised", "Start",
                  "What was to be reached", "Beside transformers",
                  "Image side", "First token", "Server", "Profile", "Decode step", "Training",
                  "Not measured"):  # fmt: skip
        assert f"**{title}" in done.stdout
    assert "a dry run: no number means anything" in done.stdout
    assert "CUDA graphs need a GPU" in done.stdout
    assert "| decode4 |" in done.stdout
    assert "| 2 × 1 of 20, float32 |" in done.stdout
    assert "| w4a16-g32, 128 × 64, 8 rows |" in done.stdout
    assert "| w8a8, 128 × 64, 16 rows |" in done.stdout
    assert "| w8a8-fp8, 128 × 64, 16 rows |" in done.stdout
    assert "| 2 of int4 |" in done.stdout
    assert "| 2 drawn, top-p |" in done.stdout
    assert "| decode4, w8a16 |" in done.stdout
    assert "| torch.compile, image side | 1 |" in done.stdout


def test_the_report_shows_what_a_cpu_does_not_measure(scripts):
    import gpu_report

    found = {"overlap": {"overlapping": 0.5, "one by one": 0.75, "fetching nothing ahead": 0.625}}
    run = SimpleNamespace(copied=None, numbers=lambda part: found)
    shown = "\n".join(gpu_report.ceilings(run))
    for way, milliseconds in found["overlap"].items():
        assert f"{way} | {gpu_report.show(milliseconds)} | ms |" in shown


def test_the_report_of_something_else_is_refused_in_words(tmp_path):
    command = [sys.executable, "scripts/gpu_report.py", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds no whole run of benchmarks/gpu.py" in done.stderr


def test_the_plan_fits_its_minutes_and_stands_in_the_docstring(scripts):
    import gpu

    assert sum(part.limit_seconds for part in gpu.PLAN) <= 9 * 60
    for part in gpu.PLAN:
        assert re.search(rf"^{part.name} +{part.limit_seconds:.0f} s  ", gpu.__doc__, re.MULTILINE)


def test_a_part_that_fails_or_hangs_hides_no_later_one(scripts, tmp_path):
    import gpu

    kept = f"open({str(tmp_path / 'hangs.json')!r}, 'w').write('[{{\"name\": \"first\"}}]')"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    pid_path = tmp_path / "pid"
    hangs = (
        f"import os, time; {kept}; open({str(pid_path)!r}, 'w').write(str(os.getpid()))\n{child}\n"
        "time.sleep(600)"
    )
    parts = [
        python("hangs", 5, hangs),
        python("fails", 60, "print('what went wrong'); raise SystemExit(3)"),
        python("works", 60, "pass"),
    ]
    outcomes = run_plan(gpu, parts, tmp_path)["parts"]
    assert [each["status"] for each in outcomes.values()] == ["out of time", "failed", "done"]
    # What the parts before have left of their time is there to be used.
    assert 60 < outcomes["works"]["limit_seconds"] < 120
    assert outcomes["fails"]["last_lines"] == ("what went wrong",)
    assert gpu.read_results(tmp_path / "hangs.json") == [{"name": "first"}]
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["parts"]["works"]
    assert not Path("/proc", pid_path.read_text("utf-8")).exists()


def test_the_run_ends_by_itself(scripts, tmp_path):
    import gpu

    started = time.monotonic()
    parts = [python("long", 600, "import time; time.sleep(600)"), python("late", 60, "pass")]
    outcomes = run_plan(gpu, parts, tmp_path, minutes=0.02)["parts"]
    assert [each["status"] for each in outcomes.values()] == ["out of time", "not started"]
    assert time.monotonic() - started < 300


def test_results_of_an_earlier_run_do_not_count(scripts, tmp_path):
    import gpu

    (tmp_path / "fails.json").write_text('[{"name": "old"}]', "utf-8")
    run_plan(gpu, [python("fails", 60, "raise SystemExit(1)")], tmp_path)
    assert gpu.read_results(tmp_path / "fails.json") == []


def test_failed_tests_come_first(scripts, tmp_path, capfd):
    import gpu
    import gpu_parts
    from gpu_results import Results

    path = tmp_path / "test_of_mine.py"
    path.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'not the same'\n"
        "def test_left_out(): pytest.skip('no reason')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_set_up(broken): pass\n",
        "utf-8",
    )
    results = Results(tmp_path / "kernels.json")
    gpu_parts.run_tests("mine", [path], results, "-c", str(CHECKOUT / "pyproject.toml"))
    (kept,) = gpu.read_results(tmp_path / "kernels.json")
    assert (kept["passed"], kept["failed"], kept["skipped"]) == (1, 2, 1)
    assert results.num_errors == 2
    capfd.readouterr()
    outcome = {"status": "failed", "seconds": 1.0, "last_lines": ["a traceback"]}
    gpu.print_summary(tmp_path, {"parts": {"kernels": outcome}})
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED")
    assert "test_wrong" in lines[0]
    assert "not the same" in lines[1]
    assert "test_set_up" in lines[2]
    assert "ValueError: broken" in lines[3]


def test_a_measurement_that_fails_is_kept_as_such(scripts, tmp_path, capfd):
    from gpu_results import Results, UnavailableError

    def fail():
        raise ValueError("two\nlines")

    def lack():
        raise UnavailableError("no such thing here")

    results = Results(tmp_path / "part.json")
    for name, measure in {"wrong": fail, "lacking": lack, "right": lambda: {"x": 1}}.items():
        results.attempt(name, measure)
    assert json.loads((tmp_path / "part.json").read_text("utf-8")) == [
        {"name": "wrong", "error": "ValueError: two lines"},
        {"name": "lacking", "unavailable": "no such thing here"},
        {"name": "right", "x": 1},
    ]
    assert results.num_errors == 1


def test_what_goes_on_without_its_fast_way_is_told_as_an_error(scripts, tmp_path):
    import gpu_parts
    from gpu_results import Results

    results, logger = Results(tmp_path / "part.json"), logging.getLogger(graphs.__name__)
    with gpu_parts.warnings_kept(results):
        logger.info("nothing")
        for why in ("no memory", "not allowed"):
            logger.warning("A step could not be captured (%s).", why)
    logger.warning("It is told no more.")
    assert json.loads((tmp_path / "part.json").read_text("utf-8")) == [
        {"name": "warning 1", "error": "A step could not be captured (no memory)."},
        {"name": "warning 2", "error": "A step could not be captured (not allowed)."},
    ]
    assert results.num_errors == 2
    for name in gpu_parts.WARNING:
        assert importlib.import_module(f"minigpt4_runtime.{name}").logger.name.endswith(name)


@pytest.mark.parametrize(
    ("facts", "fails"),
    [
        (None, False),
        ([], True),  # It never ended.
        ([{"name": "overlap", "error": "kernels that overlap compute something else"}], True),
        ([{"name": "overlap", "unavailable": "of an older capability"}], False),
        ([{"name": "overlap", "overlapping": 1.0}], False),
    ],
)
def test_if_kernels_that_overlap_are_wrong_the_other_parts_have_them_one_by_one(
    scripts, tmp_path, monkeypatch, facts, fails
):
    pytest.importorskip("triton", reason="triton is not installed")
    import gpu_parts

    monkeypatch.setenv("MINIGPT4_OVERLAP", "on")
    if facts is not None:
        (tmp_path / "facts.json").write_text(json.dumps(facts), "utf-8")
    seen = []

    def find_part(name):
        return lambda setting, results: seen.append(os.environ.get("MINIGPT4_OVERLAP"))

    monkeypatch.setattr(gpu_parts, "find_part", find_part)
    for part in ("facts", "language"):
        words = ["gpu_parts.py", part, "--out", str(tmp_path), "--dry-run"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            gpu_parts.main()
    assert seen == ["on", "off" if fails else "on"]


def as_it_is(function):
    return function


def as_it_was(function):
    result = function()
    return lambda: result


@pytest.mark.parametrize(("capture", "is_right"), [(as_it_is, True), (as_it_was, False)])
def test_graphs_that_compute_with_old_numbers_are_seen(scripts, monkeypatch, capture, is_right):
    import gpu_parts
    from gpu_results import Setting

    monkeypatch.setattr(CpuBackend, "capture", staticmethod(capture))
    with nullcontext() if is_right else pytest.raises(RuntimeError, match="been captured with"):
        assert gpu_parts.replayed(Setting(is_dry=True))["milliseconds"] >= 0


def test_steps_and_pictures_are_measured_as_they_are_loaded(scripts, monkeypatch):
    """With the device's own row operations, products and joint weights; a rival's are torch's."""
    import gpu_speed
    from gpu_results import Setting

    from minigpt4_runtime.formats.dense import DENSE
    from minigpt4_runtime.model.row_operations import TORCH_OPERATIONS, TorchOperations

    own, setting = TorchOperations(), Setting(is_dry=True)
    monkeypatch.setattr(gpu_speed, "row_operations", lambda device: own)
    monkeypatch.setattr(gpu_speed, "linear_kernel", lambda *_, **more: other_multiply)
    monkeypatch.setattr(CpuBackend, "facts", replace(CpuBackend.facts, joins=True))

    def other_multiply(rows, parts, bias):
        return DENSE.multiply(rows, parts, bias)

    for is_plain in (False, True):
        layer = gpu_speed.random_language(setting, 1, is_plain=is_plain).layers[0]
        assert layer.mlp_norm.operations is (TORCH_OPERATIONS if is_plain else own)
        assert (layer.mlp_down.multiply is other_multiply) is not is_plain
        assert (layer.mlp_inputs._whole is None) is is_plain
    config = gpu_speed.picture_config(setting)
    block = gpu_speed.random_encoder(config, setting.device, "float32").part.vit.blocks[0]
    assert block.mlp_norm.operations is own
    assert block.mlp_in.multiply is other_multiply


def test_one_answer_is_measured_in_all_formats_before_many_are(scripts, tmp_path, monkeypatch):
    import gpu_whole
    from gpu_results import Results, Setting

    device = SimpleNamespace(facts=SimpleNamespace(has_float8=False))
    monkeypatch.setattr(gpu_whole, "open_device", lambda name: device)
    monkeypatch.setattr(gpu_whole, "decode_in", lambda name, work, setting: {"rates": [1]})
    gpu_whole.quantised(Setting(is_dry=False), Results(tmp_path / "part.json"))
    found = json.loads((tmp_path / "part.json").read_text("utf-8"))
    assert [each["name"] for each in found] == [
        f"{work}, {name}" for work in ("decode1", "decode64") for name in gpu_whole.FORMATS
    ]
    assert [each["name"] for each in found if "unavailable" in each] == [
        "decode1, w8a8-fp8", "decode64, w8a8-fp8",
    ]  # fmt: skip


def test_gaps_are_what_lies_between_all_that_runs(scripts):
    from gpu_speed import busy_time

    spans = [(10.0, 30.0, "a"), (0.0, 5.0, "b"), (20.0, 25.0, "c"), (31.0, 41.0, "a")]
    assert busy_time(spans) == {"operations": 4, "busy_ms": 0.035, "longest_gap_ms": 0.005}


def make_wheel(path, *, changed=False):
    source = CHECKOUT / "src"
    with zipfile.ZipFile(path, "w") as archive:
        for each in source.rglob("*.py"):
            archive.write(each, each.relative_to(source).as_posix())
        if changed:
            archive.writestr("minigpt4_runtime/older.py", "")
    return path


def test_only_what_is_lacking_is_installed(scripts, tmp_path, monkeypatch):
    import gpu

    for name in ("pytest-1.0-py3-none-any.whl", "not_here-2.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    make_wheel(tmp_path / "minigpt4_runtime-0.1.0-py3-none-any.whl", changed=True)
    commands = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: commands.append(command))
    assert gpu.install(tmp_path, tmp_path / "site") == ["not_here-2.0-py3-none-any.whl"]
    (command,) = commands
    assert "--no-index" in command
    assert command[-1] == str(tmp_path / "not_here-2.0-py3-none-any.whl")


def test_the_projects_wheel_counts_if_it_is_this_source(scripts, tmp_path):
    import gpu

    assert gpu.holds_this_source(make_wheel(tmp_path / "same.whl"))
    assert not gpu.holds_this_source(make_wheel(tmp_path / "other.whl", changed=True))


def test_what_is_carried_comes_with_all_that_it_needs_and_is_bounded(scripts, tmp_path):
    import gpu_wheels

    carried = {each.partition("==")[0] for each in gpu_wheels.with_needs(gpu_wheels.CARRIED)}
    assert {"fastapi", "starlette", "pydantic-core", "sentencepiece"} <= carried
    assert not carried & {"torch", "numpy", "gradio"}
    (tmp_path / "one.whl").write_bytes(bytes(1000))
    assert 1000 < gpu_wheels.travelling_bytes(tmp_path) <= gpu_wheels.MOST_BYTES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "facts,nothing"], "nothing is not among facts, kernels"),
        (["--minutes", "0"], "it must be above 0"),
        (["--wheels", "/not/here"], "there is no folder /not/here"),
    ],
)
def test_wrong_options_are_refused_in_words(tmp_path, options, words):
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
