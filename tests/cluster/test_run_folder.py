"""A folder holds whole shards of one run, and says what is still to ask."""

import json
import uuid

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.cluster.result_places import StorePlace, open_place
from minigpt4_runtime.cluster.run_folder import SHARD_FORMS, RunFolder, ShardChoice

SETTINGS = {"prompt": "What is it?", "sampling": {"stop": None, "seed": 1}}
NAMES = [f"{number}.png" for number in range(7)]


def row(name, **changed):
    made = dict.fromkeys(
        ("finish_reason", "prompt_tokens", "completion_tokens", "evicted_tokens", "token_ids",
         "boxes", "picture_size", "error")
    )  # fmt: skip
    return {"image": name, "answer": "A cat.", **made, "seconds": 0.5, **changed}


# pyarrow comes with Ray.
FORMS = [pytest.param(form, marks=[pytest.mark.ray][form == "jsonl" :]) for form in SHARD_FORMS]


@pytest.fixture(params=["path", "store"])
def root(request, tmp_path):
    """Where runs are kept: a folder of this machine, and one of an object store."""
    if request.param == "path":
        yield str(tmp_path)
        return
    import fsspec

    store = f"/{uuid.uuid4()}"
    yield f"memory:/{store}"
    if fsspec.filesystem("memory").exists(store):
        fsspec.filesystem("memory").rm(store, recursive=True)


@pytest.fixture
def begin(root):
    def begin(names=NAMES, settings=SETTINGS, *, resume=False, size=3, form=None, name="run"):
        choice = ShardChoice(num_pictures=size, form=form)
        return RunFolder.open(open_place(f"{root}/{name}"), names, settings, choice, resume=resume)

    return begin


def fill(folder, shard, **changed):
    folder.write(shard, {p: row(folder.names[p], **changed) for p in folder.positions(shard)})


def todo(folder):
    return {shard: list(positions) for shard, positions in folder.to_ask()}


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_slices_in_order(begin, form):
    folder = begin(form=form)
    assert todo(folder) == {0: [0, 1, 2], 1: [3, 4, 5], 2: [6]}
    for shard in (2, 0, 1):
        fill(folder, shard)
    assert todo(folder) == {}
    assert folder.place.names() == {"run.json", *(f"part-{i:08}.{form}" for i in range(3))}
    assert [each["image"] for shard in range(3) for each in folder.read(shard)] == NAMES
    assert {folder.shard_of(position) for position in folder.positions(1)} == {1}


@pytest.mark.parametrize("form", FORMS)
def test_a_record_reads_back_as_it_was_written(begin, form):
    folder = begin(["a.png"], form=form)
    boxes = [{"label": None, "box": [1, 2, 3, 4], "start": 0, "stop": 9}]
    written = row(
        "a.png", finish_reason="stop", prompt_tokens=61, completion_tokens=3, evicted_tokens=0,
        token_ids=[5, 6, 2], boxes=boxes, picture_size=[640, 480],
    )  # fmt: skip
    folder.write(0, {0: written})
    assert folder.read(0) == [written]


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_is_no_utf8_is_kept(begin, form):
    names = ["\udc80.png", "b.png"]
    fill(begin(names, form=form), 0)
    assert todo(begin(names, form=form, resume=True)) == {}


@pytest.mark.parametrize("form", FORMS)
def test_what_failed_is_asked_again_and_the_rest_is_kept(begin, form):
    folder = begin(form=form)
    fill(folder, 0)
    rows = {p: row(NAMES[p], answer="first") for p in (3, 5)}
    folder.write(1, rows | {4: row(NAMES[4], answer=None, error="too dark")})
    folder = begin(resume=True, size=None)
    assert todo(folder) == {1: [4], 2: [6]}
    folder.write(1, {4: row(NAMES[4], answer="second")})
    assert [each["answer"] for each in folder.read(1)] == ["first", "second", "first"]
    assert todo(folder) == {2: [6]}


@pytest.mark.parametrize("root", ["path"], indirect=True)
def test_a_file_that_was_not_finished_counts_for_nothing(begin, tmp_path):
    folder = begin()
    (tmp_path / "run" / ".part-00000000.jsonl.123.tmp").write_text("{")
    assert todo(begin(resume=True)) == todo(folder)
    assert folder.place.names() == {"run.json"}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"names": [*NAMES, "7.png"]}, "is about 7 pictures and now 8 were found."),
        ({"names": [*NAMES[:-1], "8.png"]}, "is about 7 pictures and now others were found."),
        ({"settings": SETTINGS | {"prompt": "Why?"}}, "has prompt 'What is it?', and now it is"),
        ({"settings": {}}, "has prompt 'What is it?', and now it is None."),
        ({"size": 4}, "has pictures_per_shard 3, and now it is 4."),
        ({"form": "parquet"}, "has form 'jsonl', and now it is 'parquet'."),
        ({"resume": False}, "holds a run. Continue it with --resume, or give another folder."),
    ],
)
def test_another_run_is_refused(begin, changed, sentence):
    fill(begin(), 0)
    with pytest.raises(ConfigError) as refused:
        begin(**({"resume": True} | changed))
    assert sentence in str(refused.value)


def test_a_run_without_a_shard_is_begun_anew(begin):
    begin()
    begin(["b.png"], {}, size=2)
    assert todo(begin(["b.png"], {}, size=2, resume=True)) == {0: [0]}


def test_names_that_run_together_are_another_list(begin):
    begin(["ab", "c"])
    with pytest.raises(ConfigError, match="now others were found"):
        begin(["a", "bc"], resume=True)


def test_a_folder_with_other_things_is_refused(begin, root):
    for name in ("run", "bad"):
        open_place(root).make()
        open_place(f"{root}/{name}").make()
    open_place(f"{root}/run").write("mine.txt", b"x")
    with pytest.raises(ConfigError, match="which holds other files"):
        begin()
    with pytest.raises(ConfigError, match="and with --ray it is a folder"):
        begin(name="answers.jsonl")
    open_place(f"{root}/bad").write("run.json", b'{"form": "csv"}')
    with pytest.raises(ConfigError, match="is no run of this program"):
        begin(name="bad", resume=True)


def test_a_path_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="but there is no folder"):
        open_place(str(tmp_path / "none" / "run"))
    with pytest.raises(ConfigError, match="and with --ray it is a folder"):
        open_place(str(tmp_path / "mine.txt"))


class BrokenStore:
    """Stands for a store that refuses everything, in two lines."""

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise PermissionError("Access\nDenied")

        return refuse if name != "invalidate_cache" else lambda: None


def test_what_a_store_refuses_is_one_sentence(monkeypatch):
    place = StorePlace("memory://run/")
    monkeypatch.setattr(place, "_store", BrokenStore())
    for deed, sentence in {
        place.names: "memory://run cannot be listed (PermissionError: Access Denied).",
        lambda: place.read("a"): "memory://run/a cannot be read (PermissionError: Access Denied).",
        lambda: place.write("a", b""): "memory://run/a cannot be written (PermissionError: Access",
    }.items():
        with pytest.raises(ConfigError) as refused:
            deed()
        assert str(refused.value).startswith(sentence)
    with pytest.raises(ConfigError, match="nothing://x cannot be opened: Protocol not known"):
        open_place("nothing://x")


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match=r"a cannot be read \("):
        open_place(str(tmp_path)).read("a")


@pytest.mark.parametrize("content", ["", "{", '{"image": "x"}\n' * 3, "[]\n" * 3, "3\n" * 3])
def test_a_damaged_shard_is_named(begin, content):
    folder = begin()
    folder.place.write(folder.file(0), content.encode())
    with pytest.raises(ConfigError, match=r"part-00000000\.jsonl does not hold this run's shard"):
        todo(folder)


def test_choices_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match="needs 1 or more"):
        ShardChoice(num_pictures=0)
    with pytest.raises(ConfigError, match="take jsonl or parquet"):
        ShardChoice(form="csv")


def test_run_json_says_what_the_run_is_about(begin):
    content = json.loads(begin().place.read("run.json"))
    assert (content["pictures"], content["form"], content["settings"]) == (7, "jsonl", SETTINGS)
