"""Pictures from an S3 server and results on it, as over folders of this machine."""

import io
import json

import pytest
from PIL import Image

from minigpt4_runtime import ConfigError
from minigpt4_runtime.cluster.places import find_names
from minigpt4_runtime.cluster.result_places import open_place
from minigpt4_runtime.cluster.run import WorkerPlan, describe_names
from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice
from minigpt4_runtime.cluster.worker import Job
from minigpt4_runtime.config import SamplingParams

pytestmark = pytest.mark.ray


class Killed(Exception):
    """Ends the driver."""


def a_picture(number):
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(content, "PNG")
    return content.getvalue()


def open_run(names, **more):
    return RunFolder.open(
        open_place("s3://bucket/runs/one"), names, {}, ShardChoice(num_pictures=2), **more
    )


def test_a_run_from_a_bucket_into_a_bucket(s3, ray, tmp_path):
    for number in range(6):
        s3.pipe_file(f"bucket/pictures/{number}.png", a_picture(number))
    s3.pipe_file("bucket/pictures/deep/6.png", b"no picture")
    s3.pipe_file("bucket/pictures/notes.csv", b"x")
    names = [f"s3://bucket/pictures/{number}.png" for number in range(6)]
    assert find_names(["s3://bucket/pictures"], recursive=False, column=None) == names
    names = find_names(["s3://bucket/pictures/"], recursive=True, column=None)
    assert names[-1] == "s3://bucket/pictures/deep/6.png"
    names.append("s3://bucket/none.png")
    job = Job(model={}, prompt="What is there?", sampling=SamplingParams(), folder=tmp_path)
    plan = WorkerPlan(num_workers=1)

    def die(num_pictures):
        if num_pictures:
            raise Killed

    with pytest.raises(Killed):
        describe_names(job, open_run(names, resume=False), plan, on_done=die)
    with pytest.raises(ConfigError, match="s3://bucket/runs/one holds a run"):
        open_run(names, resume=False)
    before = {path: s3.info(path)["LastModified"] for path in s3.glob("bucket/runs/one/part-*")}
    tally = describe_names(job, open_run(names, resume=True), plan)
    assert before
    assert (tally.described, tally.failed) == (6 - 2 * len(before), 2)
    s3.invalidate_cache()
    assert {path: s3.info(path)["LastModified"] for path in before} == before
    files = [f"bucket/runs/one/part-{shard:08}.jsonl" for shard in range(4)]
    assert sorted(s3.ls("bucket/runs/one", detail=False)) == [*files, "bucket/runs/one/run.json"]
    rows = [json.loads(line) for file in files for line in s3.cat_file(file).splitlines()]
    assert [row["image"] for row in rows] == names
    assert all(row["answer"] for row in rows[:6])
    assert rows[7]["error"] == "s3://bucket/none.png does not exist."
    # The same pictures from this machine: the same answers.
    (tmp_path / "0.png").write_bytes(a_picture(0))
    place = open_place(str(tmp_path / "run"))
    folder = RunFolder.open(place, ["0.png"], {}, ShardChoice(), resume=False)
    describe_names(job, folder, plan)
    assert folder.read(0)[0]["answer"] == rows[0]["answer"]


def test_a_table_in_a_bucket(s3, tmp_path):
    import pyarrow
    from pyarrow import parquet

    from minigpt4_runtime.cluster.places import sources_of
    from minigpt4_runtime.images.pixels import open_rgb

    table = pyarrow.table({"image": [a_picture(0), a_picture(1)]})
    parquet.write_table(table, tmp_path / "t.parquet")
    s3.put_file(str(tmp_path / "t.parquet"), "bucket/t.parquet")
    s3.pipe_file("bucket/list.txt", b"s3://bucket/a.png\n")
    assert find_names(["s3://bucket/list.txt"], recursive=False, column=None) == [
        "s3://bucket/a.png"
    ]
    names = find_names(["s3://bucket/t.parquet"], recursive=False, column="image")
    sources = sources_of(names, folder=tmp_path, column="image", allows_local=False)
    assert [open_rgb(source).getpixel((0, 0)) for source in sources] == [(0, 0, 0), (40, 0, 0)]


def test_what_a_bucket_refuses_is_one_sentence(s3):
    with pytest.raises(ConfigError, match=r"s3://nobody/run/run\.json cannot be written \(FileNot"):
        RunFolder.open(open_place("s3://nobody/run"), ["a"], {}, ShardChoice(), resume=False)
