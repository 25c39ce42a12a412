"""Which files a folder gives, and in which order."""

from pathlib import Path

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.batch.finding import find_images


def find(*paths, recursive=False):
    return [path.as_posix() for path in find_images([Path(p) for p in paths], recursive=recursive)]


def test_a_folder_gives_its_pictures_sorted(folder):
    assert find(".") == ["a.png", "b.jpg"]
    assert find(folder) == [f"{folder.as_posix()}/a.png", f"{folder.as_posix()}/b.jpg"]


def test_recursive_looks_deeper_but_not_into_hidden_folders(folder):
    assert find(".", recursive=True) == ["a.png", "b.jpg", "sub/c.png"]


def test_what_is_plainly_a_picture_is_given_where_all_are_asked_for(folder):
    for name in ("drawing.SVG", "raw.nef", "clip.mp4", "page.pdf", "phone.heic"):
        (folder / name).write_bytes(b"x")
    assert find(".") == ["a.png", "b.jpg", "phone.heic"]
    found = find_images([folder], recursive=True, with_unreadable=True)
    assert [path.name for path in found] == [
        "a.png", "b.jpg", "drawing.SVG", "phone.heic", "raw.nef", "c.png",
    ]  # fmt: skip


def test_suffixes_may_be_in_capitals(folder):
    (folder / "a.png").rename(folder / "Z.PNG")
    assert find(".") == ["Z.PNG", "b.jpg"]


def test_a_file_is_taken_as_it_is_and_once(folder):
    assert find("notes.txt", "no.png", "b.jpg", "./b.jpg", folder / "b.jpg", ".") == [
        "notes.txt", "no.png", "b.jpg", "a.png",
    ]  # fmt: skip


def test_a_hidden_file_is_taken_when_it_is_named(folder):
    assert find(".hidden.png") == [".hidden.png"]


def test_a_linked_folder_is_not_walked_in_circles(folder):
    try:
        (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert find(".", recursive=True) == ["a.png", "b.jpg", "sub/c.png"]


def test_a_folder_without_pictures_is_refused(folder):
    (folder / "empty").mkdir()
    for recursive in (False, True):
        with pytest.raises(ConfigError, match=r"no pictures in the folder empty\. Name another"):
            find("a.png", "empty", recursive=recursive)
