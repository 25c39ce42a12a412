"""What is typed becomes names, and a name becomes the image again, wherever it lies."""

from pathlib import Path

import pytest
from PIL import Image

from minigpt4_runtime import ConfigError
from minigpt4_runtime.cluster.places import find_names, sources_of
from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images.pixels import open_rgb


@pytest.fixture
def store(folder):
    """An object store in memory with the pictures of the folder, and a list."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.png", "b.jpg", "sub/c.png", ".hidden.png", ".cache/d.png"):
        memory.pipe_file(f"/bucket/{name}", (folder / name).read_bytes())
    memory.pipe_file("/bucket/notes.csv", b"no picture")
    memory.pipe_file("/bucket/list.txt", b"memory:///bucket/a.png\n\nmemory:///none.png\n")
    yield "memory:///bucket"
    memory.rm("/bucket", recursive=True)


def find(*places, recursive=False, column=None):
    return find_names(map(str, places), recursive=recursive, column=column)


def sources(*names, column=None, folder=None):
    folder = Path.cwd() if folder is None else folder
    return sources_of(names, folder=folder, column=column, allows_local=False)


def opened(name, **where):
    (source,) = sources(name, **where)
    return open_rgb(source).size


def test_folders_and_pictures_are_those_of_describe(folder):
    assert find(".") == ["a.png", "b.jpg"]
    assert find("sub", "a.png", folder / "b.jpg", "a.png") == [
        str(Path("sub", "c.png")), "a.png", str(folder / "b.jpg"),
    ]  # fmt: skip
    assert find(".", recursive=True)[-1] == str(Path("sub", "c.png"))
    assert find((folder / "a.png").as_uri()) == [str(folder / "a.png")]


def test_a_list_names_pictures_a_line_each(folder):
    (folder / "list.txt").write_text("b.jpg\n\n  no.png \r\nhttps://a.example/x.png\nb.jpg\n")
    assert find("list.txt") == ["b.jpg", "no.png", "https://a.example/x.png"]
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        find("none.txt")
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="There are no pictures in what was named"):
        find("empty.txt")


def test_a_store_is_listed_like_a_folder(store):
    assert find(store) == ["memory:///bucket/a.png", "memory:///bucket/b.jpg"]
    assert find(f"{store}/", recursive=True) == [
        "memory:///bucket/a.png", "memory:///bucket/b.jpg", "memory:///bucket/sub/c.png",
    ]  # fmt: skip
    assert find(f"{store}/sub/c.png") == ["memory:///bucket/sub/c.png"]
    assert find(f"{store}/list.txt") == ["memory:///bucket/a.png", "memory:///none.png"]


def test_what_cannot_be_listed_is_one_sentence(folder, store):
    (folder / "empty").mkdir()
    for place, sentence in {
        "-": "which no worker has",
        "empty": "There are no pictures in the folder empty. -r looks into its subfolders too.",
        "nothing://x/y": "nothing://x/y cannot be opened: Protocol not known: nothing",
        "memory:///none.txt": "The list memory:///none.txt cannot be read",
        "a.parquet": "Name its column of pictures with --column NAME",
    }.items():
        with pytest.raises(ConfigError) as refused:
            find(place)
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="There are no tables"):
        find("empty", column="image")


def test_names_are_opened_where_they_lie(folder, store):
    assert opened("a.png") == opened(f"{store}/b.jpg") == (8, 8)
    assert opened("c.png", folder=folder / "sub") == (8, 8)  # The driver's folder, not this one.
    assert sources("no.png", "bad/x.png") == [None, None]
    (missing,) = sources(f"{store}/none.png")
    with pytest.raises(ImageError, match=r"memory:///bucket/none\.png does not exist\."):
        open_rgb(missing)
    assert sources("-") == [None]
    for name in ("file://other/x.png", "a\0.png", "nothing://x"):
        (wrong,) = sources(name)
        with pytest.raises(ImageError):
            open_rgb(wrong)
    (local,) = sources("http://127.0.0.1/x.png")
    with pytest.raises(ImageError, match=r"127\.0\.0\.1"):
        open_rgb(local)


@pytest.fixture
def table(folder):
    """Writes a.parquet: names, bytes, and cells as in Hugging Face's data sets."""
    import pyarrow
    from pyarrow import parquet

    content = [(folder / name).read_bytes() for name in ("a.png", "b.jpg")]
    Image.new("RGB", (16, 4)).save(folder / "wide.png")
    rows = [*content, None, (folder / "wide.png").read_bytes(), b"no picture"]
    columns = {
        "place": ["a.png", "b.jpg", None, "sub/c.png", "a.png"],
        "bytes": rows,
        "image": [{"bytes": each, "path": "x.png"} for each in rows],
        "number": [1, 2, 3, 4, 5],
    }
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=2)
    return "a.parquet"


@pytest.mark.ray
@pytest.mark.parametrize("column", ["bytes", "image"])
def test_rows_of_a_table_are_pictures(table, folder, column):
    names = [f"a.parquet#{row}" for row in range(5)]
    assert find(table, column=column) == find(".", column=column) == names
    # In any order, and several from one row group.
    backwards = sources(*reversed(names), "a.parquet#9", column=column)
    texts, empty, wide = backwards[0], backwards[2], backwards[1]
    assert open_rgb(wide).size == (16, 4)
    assert [open_rgb(source).size for source in backwards[3:5]] == [(8, 8), (8, 8)]
    for source, sentence in {
        empty: r"a\.parquet#2 holds no picture: the cell is empty\.",
        texts: r"a\.parquet#4",
        backwards[5]: r"a\.parquet has no row 9\.",
    }.items():
        with pytest.raises(ImageError, match=sentence):
            open_rgb(source)


@pytest.mark.ray
def test_a_column_of_text_names_pictures(table, folder):
    assert find(table, column="place") == ["a.png", "b.jpg", "sub/c.png"]
    Path(folder / "deep" / "er").mkdir(parents=True)
    (folder / table).rename(folder / "deep" / "er" / "b.parquet")
    assert len(find("deep", column="place", recursive=True)) == 3
    with pytest.raises(ConfigError, match=r"There are no tables \(\.parquet\) in the folder deep"):
        find("deep", column="place")


@pytest.mark.ray
def test_a_table_in_a_store_is_read_there(table, folder, store):
    import fsspec

    content = (folder / table).read_bytes()
    fsspec.filesystem("memory").pipe_file("/bucket/t.parquet", content)
    names = find(f"{store}/t.parquet", column="bytes")
    assert opened(names[3], column="bytes") == (16, 4)
    fsspec.filesystem("memory").pipe_file("/bucket/t.parquet", content[:-9])
    (damaged,) = sources(names[0], column="bytes")
    with pytest.raises(ImageError, match=r"The table memory:///bucket/t\.parquet cannot be read"):
        open_rgb(damaged)


@pytest.mark.ray
def test_a_column_that_holds_no_pictures_is_refused(table, folder):
    with pytest.raises(ConfigError, match="no column 'x'; it has place, bytes, image, number"):
        find(table, column="x")
    with pytest.raises(ConfigError, match=r"is of type int64\. Pictures are bytes, or text"):
        find(table, column="number")
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"The table bad\.parquet cannot be read"):
        find("bad.parquet", column="x")
