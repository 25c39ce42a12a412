"""What is in the ledger is on the disk, and is found again by what it is about."""

import json

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.report.ledger import Ledger

KEYS = ("picture", "answer")


def open_ledger(path):
    return Ledger(path, keys=KEYS)


def record(picture, answer, score=0.5):
    return {"picture": picture, "answer": answer, "score": score}


def test_a_record_is_on_the_disk_at_once_and_found_again(tmp_path):
    path = tmp_path / "made with the first record" / "a.jsonl"
    ledger = open_ledger(path)
    assert ledger.find(picture="a", answer="x") is None
    assert not path.parent.exists()
    ledger.add(record("a", "ä\ud800\n"))
    assert json.loads(path.read_bytes()) == record("a", "ä\ud800\n")
    ledger = open_ledger(path)
    assert ledger.find(picture="a", answer="ä\ud800\n") == record("a", "ä\ud800\n")
    assert ledger.find(picture="b", answer="ä\ud800\n") is None
    ledger.add(record("b", "y"))
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("kept", [-1, -2, -30])
def test_a_line_cut_short_is_forgotten(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    ledger = open_ledger(path)
    ledger.add(record("a", "x"))
    ledger.add(record("b", "y"))
    path.write_bytes(path.read_bytes()[:kept])
    ledger = open_ledger(path)
    assert ledger.find(picture="a", answer="x")
    assert ledger.find(picture="b", answer="y") is None
    ledger.add(record("b", "z"))
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["x", "z"]


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"picture": "a"}\n'])
def test_a_file_of_something_else_is_not_touched(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"Line 1 of .* is no record of this report"):
        open_ledger(path)
    assert path.read_text() == content


def test_without_a_path_it_remembers(tmp_path):
    ledger = open_ledger(None)
    ledger.add(record("a", "x"))
    assert ledger.find(picture="a", answer="x") == record("a", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "no").write_text("a file")
    ledger = open_ledger(tmp_path / "no" / "where" / "a.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        ledger.add(record("a", "x"))
