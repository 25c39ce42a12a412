"""A run over a cluster: with workers that die by chance, and with Ray itself."""

import json
import math
import os
import random
import socket
import time
import types
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.checkpoint.adapter import encode_adapter, read_projection
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.cluster import run
from minigpt4_runtime.cluster.dispatch import Dispatch
from minigpt4_runtime.cluster.result_places import LocalPlace
from minigpt4_runtime.cluster.run import Tally, WorkerPlan, describe_names
from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice
from minigpt4_runtime.cluster.worker import Job
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError


def row(name):
    empty = dict.fromkeys(
        ("finish_reason", "prompt_tokens", "completion_tokens", "evicted_tokens", "token_ids",
         "boxes", "picture_size", "error")
    )  # fmt: skip
    return {"image": name, "answer": f"about {name}", **empty, "seconds": 0.1}


def test_answers_that_are_cut_off_or_outgrew_their_window_are_counted():
    tally = Tally()
    for more in ({}, {"finish_reason": "length"}, {"finish_reason": "stop", "evicted_tokens": 9}):
        tally.count([row("a.png") | more])
    assert (tally.described, tally.cut_off, tally.outgrown) == (3, 1, 1)


class MortalWorkers:
    """In place of Ray's: they start late, answer in any order, and die at any moment."""

    def __init__(self, names, seed, share_of_deaths):
        self.names = names
        self.random = random.Random(seed)
        self.share_of_deaths = share_of_deaths
        self.num_started = 0
        self.starting, self.ready, self.dead, self.asked = [], [], [], []

    def start(self):
        self.starting.append(self.num_started)
        self.num_started += 1

    def ask(self, worker, task):
        assert worker in self.ready
        self.asked.append((worker, task))

    def news(self):
        if self.starting and (not self.asked or self.random.random() < 0.5):
            self.ready.append(self.starting.pop())
            return
        worker, task = self.asked.pop(self.random.randrange(len(self.asked)))
        if self.random.random() < self.share_of_deaths:
            self.asked = [each for each in self.asked if each[0] != worker]
            self.ready.remove(worker)
            self.dead.append((worker, "it was killed"))
            return
        yield worker, task, [row(self.names[position]) for position in task.positions]

    def take_dead(self):
        while self.dead:
            yield self.dead.pop()


def feed(folder, seed, *, share_of_deaths, num_workers=3, on_done=lambda _: None):
    """A run without Ray; its tally and the workers."""
    todo, tally = dict(folder.to_ask()), Tally()
    shards = run.OpenShards(folder, {shard: len(each) for shard, each in todo.items()}, tally)
    workers = MortalWorkers(folder.names, seed, share_of_deaths)
    run._feed(workers, Dispatch(run._cut(todo, num_workers)), shards, num_workers, on_done)
    return tally, workers


@pytest.fixture
def folder(tmp_path):
    names = [f"{number}.png" for number in range(500)]
    return RunFolder.open(
        LocalPlace(tmp_path / "run"), names, {}, ShardChoice(num_pictures=60), resume=False
    )


@pytest.mark.parametrize("seed", range(10))
def test_there_is_one_record_for_each_picture_whatever_dies(folder, seed):
    done = []
    tally, workers = feed(folder, seed, share_of_deaths=0.2, on_done=done.append)
    records = [record for shard in range(folder.num_shards) for record in folder.read(shard)]
    assert [record["image"] for record in records] == folder.names
    for record in records:
        assert (
            record["answer"] == f"about {record['image']}"
            or "process that described" in (record["error"])
        )
    assert tally.described + tally.failed == sum(done) == 500
    assert workers.num_started > 3


class Killed(Exception):
    """Ends the driver."""


def _written(file):
    """What changes when a file is written, and not when it is read."""
    facts = file.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_driver_is_continued_where_it_was(folder, tmp_path, seed):
    left = random.Random(seed).randrange(1, 500)

    def count(num_pictures):
        nonlocal left
        left -= num_pictures
        if left <= 0:
            raise Killed

    with pytest.raises(Killed):
        feed(folder, seed, share_of_deaths=0, on_done=count)
    files = {shard: tmp_path / "run" / folder.file(shard) for shard in range(9)}
    written = {shard: _written(file) for shard, file in files.items() if file.exists()}
    tally, _ = feed(folder, seed + 1, share_of_deaths=0)
    assert tally.described == 500 - sum(len(folder.positions(shard)) for shard in written)
    assert {shard: _written(files[shard]) for shard in written} == written
    names = [record["image"] for shard in range(9) for record in folder.read(shard)]
    assert names == folder.names


def test_workers_that_all_die_end_the_run(folder):
    with pytest.raises(BackendUnavailableError, match=r"ended one after .* nothing\. The last one"):
        feed(folder, 0, share_of_deaths=1)


def test_few_pictures_are_not_cut_into_fewer():
    def sizes(num_pictures, num_workers):
        tasks = run._cut({0: range(num_pictures)}, num_workers)
        return [len(task.positions) for task in tasks]

    assert sizes(10, 1) == [5, 5]
    assert sizes(50, 1) == [16, 16, 16, 2]
    assert sizes(100, 1) == [25] * 4
    assert sizes(10, 2) == [3, 3, 3, 1]


@pytest.mark.parametrize(("num_pictures", "num_workers"), [(10, 2), (10_000, 2), (1, 8), (300, 64)])
def test_tasks_are_within_shards_and_enough_for_all(num_pictures, num_workers):
    todo = {0: range(min(num_pictures, 1000))}
    if num_pictures > 1000:
        todo |= {i: range(1000 * i, 1000 * i + 1000) for i in range(1, num_pictures // 1000)}
    tasks = list(run._cut(todo, num_workers))
    assert [p for task in tasks for p in task.positions] == list(range(num_pictures))
    assert len(tasks) >= min(num_pictures, num_workers)
    assert all(task.positions[0] // 1000 == task.positions[-1] // 1000 for task in tasks)
    assert max(len(task.positions) for task in tasks) <= run.MOST_PICTURES_PER_TASK


def test_room_is_counted_machine_by_machine():
    machines = [({"CPU": 3, "GPU": 1}, True), ({"CPU": 8}, True), ({"CPU": 64, "GPU": 8}, False)]
    ray = types.SimpleNamespace(
        nodes=lambda: [{"Resources": held, "Alive": alive} for held, alive in machines]
    )
    assert run._room(ray, WorkerPlan(cpus=2)) == 5
    assert run._room(ray, WorkerPlan(cpus=1, gpus=0.5)) == 2
    with pytest.raises(ConfigError, match="No machine of the Ray cluster has 4 CPUs and 1 GPUs"):
        run._room(ray, WorkerPlan(cpus=4, gpus=1))
    with pytest.raises(ConfigError, match="needs a part"):
        WorkerPlan(cpus=math.nan)


def test_an_address_at_which_nothing_listens_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
            run._check_reachable(address)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        with pytest.raises(BackendUnavailableError) as refused:
            run._check_reachable(address)
        assert str(refused.value).startswith(f"No Ray cluster answers at {address} (")


def test_only_the_first_failures_are_kept():
    tally = Tally()
    tally.count([{**row(str(number)), "answer": None, "error": "bad"} for number in range(30)])
    assert (tally.failed, len(tally.failures)) == (30, run.MOST_FAILURES_SHOWN)


def job(folder, **changed):
    given = {"model": {}, "prompt": "How many shapes are there?", "sampling": SamplingParams()}
    return Job(**given | {"folder": folder} | changed)


@pytest.mark.ray
def test_ray_describes_what_is_there(ray, tmp_path):
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    names = [*(f"{number}.png" for number in range(6)), "bad.png", "none.png"]
    folder = RunFolder.open(
        LocalPlace(tmp_path / "run"),
        names,
        {},
        ShardChoice(num_pictures=3, form="parquet"),
        resume=False,
    )
    started = []
    tally = describe_names(
        job(tmp_path), folder, WorkerPlan(cpus=0.5), on_start=lambda *counts: started.append(counts)
    )
    assert started == [(8, 4)]
    assert (tally.described, tally.failed, tally.lost_workers) == (6, 2, 0)
    records = [record for shard in range(3) for record in folder.read(shard)]
    assert [record["image"] for record in records] == names
    assert all(record["answer"] for record in records[:6])
    assert "damaged" in records[6]["error"]
    assert records[7]["error"] == "none.png does not exist."
    assert describe_names(job(tmp_path), folder, WorkerPlan()).done_before == 6


@pytest.mark.ray
def test_what_a_worker_raises_on_purpose_ends_the_run(ray, tmp_path):
    folder = RunFolder.open(
        LocalPlace(tmp_path / "run"), ["a.png"], {}, ShardChoice(), resume=False
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    plan = WorkerPlan(num_workers=1)
    with pytest.raises(CheckpointError):
        describe_names(job(tmp_path, model={"model": str(tmp_path)}), folder, plan)
    with pytest.raises(ConfigError, match="Install the same on all machines"):
        describe_names(job(tmp_path, version="0.0.1"), folder, plan)
    with pytest.raises(ConfigError, match="4 CPUs"):
        describe_names(job(tmp_path), folder, WorkerPlan(cpus=4))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pictures"] == 1


def followers():
    """The processes of this cluster, known by its token, that follow in a group of ranks."""
    found, token = [], os.environ["RAY_AUTH_TOKEN"].encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended.
            if (
                b"minigpt4_runtime.ranks" in (folder / "cmdline").read_bytes()
                and token in (folder / "environ").read_bytes()
            ):
                found.append(folder.name)
    return found


@pytest.mark.ray
def test_workers_have_ranks_and_an_adapter(ray, tmp_path):
    """A worker's model is loaded as any other: from several ranks, with a tuned projection."""
    with MiniGPT4.load() as plain:
        weight, bias = read_projection(plain.model_dir)
        record = {"base": vision_digest(plain.model_dir)}
        (tmp_path / "adapter").write_bytes(encode_adapter(-weight, bias, record))
        Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "a.png")
        asked = job(tmp_path)
        as_it_was = plain.describe(tmp_path / "a.png", asked.prompt)
    changed = {"adapter": str(tmp_path / "adapter")}
    with MiniGPT4.load(**changed) as tuned:
        expected = tuned.describe(tmp_path / "a.png", asked.prompt)
    assert expected.token_ids != as_it_was.token_ids
    folder = RunFolder.open(
        LocalPlace(tmp_path / "run"), ["a.png"], {}, ShardChoice(), resume=False
    )
    asked = job(tmp_path, model=changed | {"tensor_parallel": 2})
    seen = []
    plan = WorkerPlan(num_workers=1)
    tally = describe_names(asked, folder, plan, on_done=lambda _: seen.append(len(followers())))
    assert (tally.described, seen) == (1, [1, 1])
    (found,) = folder.read(0)
    assert tuple(found["token_ids"]) == expected.token_ids
    # The worker was killed; what it started notices that it is gone.
    deadline = time.monotonic() + 60
    while followers():
        assert time.monotonic() < deadline, "a rank outlived its leader"
        time.sleep(0.2)
