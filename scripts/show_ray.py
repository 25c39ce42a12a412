"""Show that a run on Ray loses no picture and describes none twice, whatever is killed.

python scripts/show_ray.py
python scripts/show_ray.py --pictures 600 --only workers worker driver deadly store

Pictures are drawn for the run, and the demo model describes them: once by a plain `minigpt4
describe`, and once by each part below, whose records are then compared with the plain ones, all
keys but the time.

workers  three workers on this machine
worker   three workers; one is killed in the middle
driver   the command itself is killed in the middle, and continued with --resume
deadly   a picture whose opening ends the process (an object store that is made for this)
store    pictures and results on an S3 server on this machine (moto, s3fs); the command is killed in
         the middle, and continued with --resume
machine  two machines, which are network namespaces with a cable between them (Linux, root); in the
         middle the cable is pulled, and the second machine's processes are killed
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4_runtime.evaluation import scenes

MINIGPT4 = [sys.executable, "-m", "minigpt4_runtime"]
SHARD_SIZE = 20
# Every process that Ray starts for a run inherits it.
MARK = "SHOW_RAY_RUN"
HEAD, SECOND = "showray1", "showray2"
HEAD_IP, SECOND_IP = "10.213.7.1", "10.213.7.2"
DEADLY_STORE = """
import os
import fsspec
from fsspec.implementations.local import LocalFileSystem

class Deadly(LocalFileSystem):
    protocol = "deadly"
    def cat_file(self, path, start=None, end=None, **more):
        if path.endswith("00007.png"):
            os._exit(1)
        return super().cat_file(path, start, end, **more)
    def unstrip_protocol(self, path):
        return f"deadly://{path}"

fsspec.register_implementation("deadly", Deadly)
"""


def draw_pictures(folder: Path, count: int, *, seed: int = 1) -> None:
    """Draw scenes, each another, as 00000.png and so on."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        picture = scenes.draw(scenes.random_scene(rng, held_out=True), rng, side=112)
        picture.save(folder / f"{number:05}.png")


class Run:
    """A run of the command on Ray, as a process."""

    def __init__(
        self, what: str, out: Path | str, *options: str, before: tuple[str, ...] = ()
    ) -> None:
        self.out = Path(out)
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*before, *MINIGPT4, "describe", what, "--out", str(out), *options],
            env=os.environ | {MARK: self.mark}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_shards(self, count: int, count_shards: Callable[[], int] | None = None) -> None:
        """Wait until so many shards are written."""
        count_shards = count_shards or (lambda: len(list(self.out.glob("part-*"))))
        while count_shards() < count:
            if self.process.poll() is not None:
                raise SystemExit(f"it ended too early: {self.end()}")
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for its end; give the last lines that it said."""
        _, said = self.process.communicate()
        ours = re.compile(r"\d+ (pictures,|described,|workers? w)")
        lines = [line for line in said.splitlines() if ours.match(line)]
        return re.sub(": see [^;]*", "", "; ".join(lines)) or said


def processes(is_one: Callable[[Path], bool]) -> list[int]:
    """The ids of the processes with this property of their folder in /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if is_one(folder):
                found.append(int(folder.name))
        except OSError:  # It has ended.
            continue
    return found


def is_worker_of(mark: str) -> Callable[[Path], bool]:
    """Whether a process is a worker of the run with this mark."""
    return lambda folder: (
        (folder / "cmdline").read_bytes().startswith(b"ray::Worker")
        and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
    )


def records_of(out: Path) -> list[dict[str, object]]:
    """All records of a run or a file, in order, without their times."""
    parts = sorted(out.glob("part-*")) if out.is_dir() else [out]
    records = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def compare(name: str, run: Run, plain: list[dict[str, object]], said: str) -> None:
    """Print what became of a run; end the program if a record is not as it should be."""
    records = records_of(run.out)
    names = [record["image"] for record in records]
    is_same = records == plain
    print(
        f"{name}: {len(names)} records of {len(plain)} pictures, {len(names) - len(set(names))} "
        f"twice, {'equal' if is_same else 'NOT EQUAL'} to the plain run's\n    {said}",
        flush=True,
    )
    if not is_same:
        raise SystemExit(1)


def show_workers(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """Three workers, none killed."""
    run = Run(str(pictures), folder, *LOCAL)
    compare("workers", run, plain, run.end())


def show_killed_worker(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """One of three is killed when some shards are written."""
    run = Run(str(pictures), folder, *LOCAL)
    run.wait_for_shards(3)
    os.kill(processes(is_worker_of(run.mark))[0], signal.SIGKILL)
    compare("worker killed", run, plain, run.end())


def show_killed_driver(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """The driver is killed twice, and continued."""
    run = Run(str(pictures), folder, *LOCAL)
    for num_shards in (3, 8):
        run.wait_for_shards(num_shards)
        run.process.kill()
        run.process.communicate()
        run = Run(str(pictures), folder, *LOCAL, "--resume")
    compare("driver killed twice", run, plain, run.end())


def show_deadly_picture(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """The seventh picture ends each process that opens it."""
    store = folder.with_name("store")
    store.mkdir()
    (store / "sitecustomize.py").write_text(DEADLY_STORE, encoding="utf-8")
    path = os.pathsep.join([str(store), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = path
    run = Run(f"deadly://{pictures}", folder, *LOCAL)
    said = run.end()
    records = records_of(folder)
    for record in records:
        record["image"] = str(record["image"]).removeprefix("deadly://")
    differing = [now for now, then in zip(records, plain, strict=True) if now != then]
    print(f"deadly picture: {len(differing)} of {len(plain)} records differ\n    {said}")
    for record in differing:
        print(f"    {Path(str(record['image'])).name}: {record['error']}")
    if [Path(str(record["image"])).name for record in differing] != ["00007.png"]:
        raise SystemExit(1)


def show_store(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """Pictures from a bucket, results into it, and a driver that is killed."""
    with s3_server() as store:
        store.put(f"{pictures}/", "bucket/pictures/", recursive=True)
        arguments = ("s3://bucket/pictures", "s3://bucket/run", *LOCAL)
        run = Run(*arguments)
        run.wait_for_shards(3, lambda: len(store.glob("bucket/run/part-*")))
        run.process.kill()
        run.process.communicate()
        run = Run(*arguments, "--resume")
        said = run.end()
        store.get("bucket/run/", f"{folder}/", recursive=True)
    run.out = folder
    as_named = [
        {**record, "image": f"s3://bucket/pictures/{Path(str(record['image'])).name}"}
        for record in plain
    ]
    compare("object store, driver killed", run, as_named, said)


@contextmanager
def s3_server() -> Iterator[Any]:
    """An S3 server with an empty bucket, and fsspec's view of it. Later processes find it too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It tells each request.
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any",
    }  # fmt: skip
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    store.mkdir("bucket")
    yield store
    server.stop()


def show_lost_machine(pictures: Path, folder: Path, plain: list[dict[str, object]]) -> None:
    """Of two machines the second is lost: its cable first, so that nobody is told of its end."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        print("machine lost: not shown; network namespaces need Linux, root and iproute2")
        return
    with two_machines(folder.with_name("ray")):
        run = Run(
            str(pictures), folder, "--ray", f"{HEAD_IP}:6379", "--workers", "2",
            "--shard-size", str(SHARD_SIZE), before=within(HEAD),
        )  # fmt: skip
        run.wait_for_shards(3)
        ip("-n", HEAD, "link", "set", "showray1", "down")
        kill_all_in(SECOND)
        compare("machine lost", run, plain, run.end())


def ip(*arguments: str) -> str:
    """Run `ip` and give what it prints."""
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def within(namespace: str) -> tuple[str, ...]:
    """What stands before a command to run it on one of the machines."""
    return ("ip", "netns", "exec", namespace)


def kill_all_in(namespace: str) -> None:
    """Kill the processes on a machine."""
    for process in ip("netns", "pids", namespace).split():
        os.kill(int(process), signal.SIGKILL)


@contextmanager
def two_machines(folder: Path) -> Iterator[None]:
    """Two network namespaces with a Ray cluster of a CPU in each."""
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    for namespace in (HEAD, SECOND):
        ip("netns", "add", namespace)
    try:
        ip("link", "add", "showray1", "netns", HEAD, "type", "veth", "peer", "showray2",
           "netns", SECOND)  # fmt: skip
        for namespace, device, address in (
            (HEAD, "showray1", HEAD_IP), (SECOND, "showray2", SECOND_IP),
        ):  # fmt: skip
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        both = [ray, "start", "--num-cpus=1", "--disable-usage-stats"]
        starts = {
            HEAD: [*both, "--head", f"--node-ip-address={HEAD_IP}", "--port=6379",
                   "--include-dashboard=false", f"--temp-dir={folder}"],
            SECOND: [*both, f"--address={HEAD_IP}:6379", f"--node-ip-address={SECOND_IP}"],
        }  # fmt: skip
        for namespace, start in starts.items():
            subprocess.run([*within(namespace), *start], check=True, stdout=subprocess.DEVNULL)
        yield
    finally:
        for namespace in (SECOND, HEAD):
            kill_all_in(namespace)
            ip("netns", "del", namespace)


LOCAL = ("--ray", "local", "--workers", "3", "--worker-cpus", "0.5", "--shard-size",
         str(SHARD_SIZE))  # fmt: skip
PARTS: dict[str, Callable[[Path, Path, list[dict[str, object]]], None]] = {
    "workers": show_workers,
    "worker": show_killed_worker,
    "driver": show_killed_driver,
    "deadly": show_deadly_picture,
    "store": show_store,
    "machine": show_lost_machine,
}


def main() -> None:
    """Draw, describe plainly, and show each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    # Without these Ray would keep a token in the user's home.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="showray") as name:
        folder = Path(name)
        draw_pictures(folder / "pictures", options.pictures)
        subprocess.run(
            [*MINIGPT4, "describe", str(folder / "pictures"), "--out", str(folder / "plain.jsonl")],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        plain = sorted(records_of(folder / "plain.jsonl"), key=lambda each: str(each["image"]))
        for part in options.only:
            PARTS[part](folder / "pictures", folder / f"run-{part}", plain)


if __name__ == "__main__":
    main()
