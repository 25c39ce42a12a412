"""`describe --ray`: what goes with it and what does not, and a run without Ray's help."""

import json
import sys

import pytest

from minigpt4_runtime.cli.describe_on_ray import Question, _model, complete_ray
from minigpt4_runtime.cli.options import ModelOptions
from minigpt4_runtime.cluster import run
from minigpt4_runtime.cluster.worker import Job, Worker
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import CheckpointError, ConfigError


@pytest.fixture
def without_ray(monkeypatch):
    """A machine on which Ray cannot be imported."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("describe x --ray --out d", "describe x --ray auto --out d"),
        ("describe --ray x --out d", "describe --ray auto x --out d"),
        ("describe x --ray", "describe x --ray auto"),
        ("describe x --ray local", "describe x --ray local"),
        ("describe x --ray 10.0.0.1:6379 -r", "describe x --ray 10.0.0.1:6379 -r"),
        ("describe --ray head.example:6379 x", "describe --ray head.example:6379 x"),
        ("describe --ray ray://head:10001 x", "describe --ray ray://head:10001 x"),
        ("describe --ray s3://bucket/x", "describe --ray auto s3://bucket/x"),
        ("describe -- --ray", "describe -- --ray"),
        ("describe x", "describe x"),
    ],
)
def test_the_address_may_be_left_out(typed, read):
    arguments = typed.split()
    complete_ray(arguments)
    assert " ".join(arguments) == read


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (("--ray",), "--ray writes its records into a folder: name it with --out DIR."),
        (("--ray", "--out", "d", "--draw", "e"), "--draw does not go with --ray: the boxes are"),
        (("--ray", "--out", "d", "--workers", "0"), "0 workers describe nothing: ask for 1 or"),
        (("--ray", "--out", "d", "--worker-cpus", "0"), "A worker takes 0 CPUs and 0 GPUs; it"),
        (
            ("--ray", "--out", "d", "--worker-gpus", "1", "--tensor-parallel", "2"),
            "A worker takes 1 GPUs, and --tensor-parallel divides its model over 2: give --worker",
        ),
        (("--ray", "--out", "d", "--shard-format", "csv"), "There is no form 'csv' of shards"),
        (("--ray", "--out", "d", "--shard-size", "0"), "A shard has 0 pictures; it needs 1"),
        (("--ray", "--out", "no/d"), "--out is no/d, but there is no folder no."),
        (("--ray", "--out", "d", "--model", "vicuna-7b"), "vicuna-7b"),
        (("--out", "s3://b/d"), "--out is s3://b/d, and only --ray writes into a store. Name a f"),
        (("--workers", "2"), "--workers goes with --ray. Add one of them."),
        (("--shard-format", "jsonl"), "--shard-format goes with --ray. Add one of them."),
    ],
)
def test_what_does_not_go_is_one_sentence(
    minigpt4, folder, cache_home, monkeypatch, typed, sentence
):
    monkeypatch.setitem(sys.modules, "ray", object())
    shown = minigpt4("describe", "a.png", *typed)
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: ")
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not (folder / "d").exists()


def test_without_ray_it_says_what_to_install(minigpt4, folder, without_ray):
    shown = minigpt4("describe", "a.png", "--ray", "--out", "d")
    install = "pip install 'minigpt4-runtime[ray]'"
    assert shown.err == f"error: ray is not installed on this machine. Run: {install}\n"
    assert (shown.status, (folder / "d").exists()) == (1, False)


@pytest.fixture
def in_process(monkeypatch):
    """In place of Ray's workers: one in this process, which is asked all at once."""
    monkeypatch.setitem(sys.modules, "ray", object())

    def describe_names(job, folder, plan, *, on_start, on_done):
        worker, tally = Worker(job), run.Tally()
        worker.load()
        todo = dict(folder.to_ask())
        num_todo = sum(map(len, todo.values()))
        tally.done_before = len(folder.names) - num_todo
        on_start(num_todo, plan.num_workers or 1)
        for shard, positions in todo.items():
            rows = worker.describe([folder.names[position] for position in positions])
            folder.write(shard, dict(zip(positions, rows, strict=True)))
            tally.count(rows)
            on_done(len(positions))
        return tally

    monkeypatch.setattr(run, "describe_names", describe_names)


def test_records_are_those_of_describe(minigpt4, folder, bad_picture, in_process):
    (folder / "list.txt").write_text("b.jpg\nbad.png\nno.png\nsub/c.png\na.png\n")
    plain = minigpt4("describe", "b.jpg", "bad.png", "no.png", "sub/c.png", "a.png",
                     "--prompt", "backwards", "--out", "plain.jsonl")  # fmt: skip
    shown = minigpt4("describe", "list.txt", "--prompt", "backwards", "--ray", "--workers", "2",
                     "--shard-size", "2", "--out", "run")  # fmt: skip
    assert (plain.status, shown.status, shown.out) == (1, 1, "")
    parts = sorted((folder / "run").glob("part-*"))
    assert [len(part.read_text().splitlines()) for part in parts] == [2, 2, 1]
    texts = ["".join(part.read_text() for part in parts), (folder / "plain.jsonl").read_text()]
    found, expected = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [record["image"] for record in found] == (folder / "list.txt").read_text().split()
    for record in [*found, *expected]:
        del record["seconds"]
    assert found == sorted(
        expected, key=lambda each: [r["image"] for r in found].index(each["image"])
    )
    _, started, *failures, summary = shown.err.splitlines()
    assert started == "5 pictures, 2 workers"
    assert [line.partition(":")[0] for line in failures] == ["error", "error"]
    assert failures[1] == "error: no.png does not exist."
    assert summary == "3 described, 2 failed: see run"


def test_a_run_is_continued(minigpt4, folder, bad_picture, in_process):
    command = ("describe", ".", "--ray", "--out", "run", "--shard-size", "1")
    assert minigpt4(*command).err.splitlines()[-1] == "2 described, 1 failed: see run"
    (folder / "run" / "part-00000000.jsonl").unlink()
    assert minigpt4(*command).err.startswith("error: run holds a run. Continue it with --resume")
    (folder / "a.png").replace(folder / "bad.png")
    (folder / "a.png").write_bytes((folder / "b.jpg").read_bytes())
    shown = minigpt4(*command, "--resume")
    assert shown.err.splitlines()[-1] == "2 described, 0 failed, 1 done before: see run"
    assert shown.status == 0
    other = minigpt4(*command, "--resume", "--prompt", "Why?")
    assert other.err.startswith("error: The run in run has prompt 'Describe this image in detail.'")


def test_many_failures_are_counted_and_the_first_are_shown(minigpt4, folder, in_process):
    (folder / "list.txt").write_text("".join(f"{i}.png\n" for i in range(50)))
    *_, last_shown, more, summary = minigpt4(
        "describe", "list.txt", "--ray", "--out", "run"
    ).err.splitlines()
    assert last_shown == "error: 19.png does not exist."
    assert more == "… and 30 more: see the records with an error."
    assert summary == "0 described, 50 failed: see run"


def test_a_worker_of_another_version_is_refused():
    job = Job(model={}, prompt="", sampling=SamplingParams(), folder=".", version="0.0.1")
    with pytest.raises(ConfigError, match=r"and this program 0\.0\.1\. Install the same on all"):
        Worker(job).load()


def test_an_adapter_is_known_by_its_content(tmp_path):
    """Workers have folders of their own, and a file of the same name may be another training's."""
    path = tmp_path / "projection.safetensors"
    path.write_bytes(b"one")
    question = Question(
        prompt="What?", task=None, params=SamplingParams(), cache_window=None,
        allow_local_urls=False, recursive=False, resume=False, draw=None,
    )  # fmt: skip
    arguments, settings = _model(ModelOptions(adapter=path), question)
    assert arguments["adapter"] == str(path)
    path.write_bytes(b"two")
    assert json.loads(json.dumps(settings)) != _model(ModelOptions(adapter=path), question)[1]
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        _model(ModelOptions(adapter=tmp_path / "none"), question)
