"""A report's files appear whole, and what stands in the way is said before anything is computed."""

import json
import os

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.report.files import ReportFolder
from minigpt4_runtime.report.table import Column, Table


class Result:
    def as_text(self):
        return "ä"

    def as_mapping(self):
        return {"name": "caf\udce9", "share": 0.5}

    def as_rows(self):
        return Table((Column("name"),), (("ä",),))

    def as_page(self):
        return "<p>ä"


def test_the_three_files(tmp_path):
    folder = ReportFolder(tmp_path / "out", "clip")
    assert not (tmp_path / "out").exists(), "nothing has been written yet"
    assert folder.write(Result()) == tmp_path / "out" / "clip.html"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clip.csv", "clip.html", "clip.json",
    ]  # fmt: skip
    assert (tmp_path / "out" / "clip.html").read_text(encoding="utf-8") == "<p>ä"
    assert (tmp_path / "out" / "clip.csv").read_text(encoding="utf-8") == "name\nä\n"
    assert json.loads((tmp_path / "out" / "clip.json").read_bytes()) == Result().as_mapping()


def test_a_folder_that_is_there_is_used_and_what_else_is_in_it_stays(tmp_path):
    (tmp_path / "parity.html").write_text("older")
    ReportFolder(tmp_path, "clip").write(Result())
    assert (tmp_path / "parity.html").read_text() == "older"


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "which is no folder"), ("link", "which is no folder"),
     ("no/where", "there is no folder")],
)  # fmt: skip
def test_a_folder_that_cannot_be(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ConfigError, match=message):
        ReportFolder(tmp_path / name, "clip")


@pytest.mark.parametrize("refused", [os.W_OK, os.X_OK])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path or not mode & refused)
    for path in (tmp_path, tmp_path / "new"):
        with pytest.raises(ConfigError, match="which may not be written"):
            ReportFolder(path, "clip")


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_new_folder_goes_with_the_report_that_fails(tmp_path, monkeypatch, stop):
    def fail(*_):
        raise stop

    monkeypatch.setattr("os.fsync", fail)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises((ConfigError, KeyboardInterrupt)):
            ReportFolder(folder, "clip").write(Result())
    assert tmp_path.is_dir(), "this one was there before"
    assert not list(tmp_path.iterdir())


def test_a_page_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    folder = ReportFolder(tmp_path, "clip")
    folder.write(Result())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match=r"clip\.json cannot be written \(No space left"):
        folder.write(Result())
    assert (tmp_path / "clip.html").read_text(encoding="utf-8") == "<p>ä"
