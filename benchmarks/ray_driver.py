"""What a run on Ray costs the program that drives it, without Ray, a model or a disk that is slow.

python benchmarks/ray_driver.py

A list of names as object stores have them, and records of 128 ids and 500 letters, which are put
into shards as they would come from workers, 125 at a time. What Ray takes to deliver a record is
not in it. Prints bytes, and microseconds of the processor, for a picture.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from minigpt4_runtime.batch.results import Record
from minigpt4_runtime.cluster.result_places import LocalPlace
from minigpt4_runtime.cluster.run import OpenShards, Tally
from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice

PER_TASK = 125
MEMORY_UNIT = 1024  # Of ru_maxrss, on Linux.


def main() -> None:
    """Measure names, writing and checking."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [f"s3://bucket/pictures/{i // 1000:05}/{i:09}.jpg" for i in range(options.pictures)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * MEMORY_UNIT
    print(f"names of {len(names[0])} letters: {grown / len(names):.0f} bytes each in memory")
    record = asdict(
        Record(
            image=names[0], answer="word " * 100, finish_reason="stop", prompt_tokens=61,
            completion_tokens=128, evicted_tokens=0, token_ids=tuple(range(1000, 1128)),
            seconds=1.234,
        )
    )  # fmt: skip
    print(f"a record as JSON: {len(json.dumps(record))} bytes")
    with tempfile.TemporaryDirectory(prefix="raydriver") as name:
        choice = ShardChoice()
        folder = RunFolder.open(LocalPlace(Path(name) / "run"), names, {}, choice, resume=False)
        missing = {shard: len(folder.positions(shard)) for shard in range(folder.num_shards)}
        shards = OpenShards(folder, missing, Tally())
        started = time.process_time()
        for start in range(0, options.records, PER_TASK):
            positions = range(start, start + PER_TASK)
            shards.add(positions, [{**record, "image": names[each]} for each in positions])
        written = time.process_time()
        left = sum(len(positions) for _, positions in folder.to_ask())
        checked = time.process_time()
    assert left == options.pictures - options.records
    print(f"to write a record: {(written - started) / options.records * 1e6:.1f} µs")
    print(f"to check one again: {(checked - written) / options.records * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
