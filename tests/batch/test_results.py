"""Nothing that was done is lost: not by a crash, a full disk or a second run."""

import json
import os
from pathlib import Path

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.batch.results import Record, open_results
from minigpt4_runtime.messages import Box


def good(image, answer="An answer."):
    return Record(image=image, answer=answer, finish_reason="stop", seconds=0.5)


def bad(image):
    return Record(image=image, error="It is damaged.", seconds=0.1)


def write(path, *records, resume=False, images=("a", "b", "c")):
    with open_results(path, resume=resume, images=list(images)) as results:
        for record in records:
            results.add(record)
    return results


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(path):
    return [line["image"] for line in lines(path)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", "must end with .json or .jsonl"),
        ("out", "must end with .json or .jsonl"),
        ("nowhere/out.json", "there is no folder"),
        ("folder.json", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path, name, message):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=message):
        open_results(tmp_path / name, resume=False, images=())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="may not be written"):
        open_results(tmp_path / "out.json", resume=False, images=())


def test_resume_needs_a_jsonl(tmp_path):
    for path in (None, tmp_path / "out.json"):
        with pytest.raises(ConfigError, match=r"--resume continues a"):
            open_results(path, resume=True, images=())


def break_off(path, *records, resume=False):
    """Give the notes that a run which is broken off makes."""
    notes = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with open_results(path, resume=resume, images=["a"], note=notes.append) as results:
            for record in records:
                results.add(record)
            raise KeyboardInterrupt
    return notes


class TestJsonLines:
    def test_every_record_is_there_at_once(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with open_results(path, resume=False, images={"a", "b"}) as results:
            assert not path.exists()
            results.add(good("ä", "Überall…"))
            assert path.read_text(encoding="utf-8").startswith('{"image": "ä", "answer": "Übera')
            results.add(bad("b"))
            assert lines(path) == [
                {"image": "ä", "answer": "Überall…", "finish_reason": "stop",
                 "prompt_tokens": None, "completion_tokens": None, "evicted_tokens": None,
                 "token_ids": None, "boxes": None, "picture_size": None, "seconds": 0.5,
                 "error": None},
                {"image": "b", "answer": None, "finish_reason": None, "prompt_tokens": None,
                 "completion_tokens": None, "evicted_tokens": None, "token_ids": None,
                 "boxes": None, "picture_size": None, "seconds": 0.1, "error": "It is damaged."},
            ]  # fmt: skip

    def test_an_existing_file_is_not_touched_without_resume(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, good("a"))
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=r"out\.jsonl exists\. Continue it with --resume"):
            write(path, good("b"))
        assert path.read_bytes() == before

    def test_an_empty_file_may_be_filled(self, tmp_path):
        path = tmp_path / "out.jsonl"
        path.touch()
        write(path, good("a"))
        assert images(path) == ["a"]

    def test_resume_without_a_file_begins_one(self, tmp_path):
        path = tmp_path / "out.jsonl"
        assert write(path, good("a"), resume=True).done == set()
        assert images(path) == ["a"]

    def test_resume_keeps_answers_and_drops_what_is_tried_again(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, good("a"), bad("b"), bad("elsewhere"))
        assert write(path, good("b"), good("c"), resume=True).done == {"a"}
        assert images(path) == ["a", "elsewhere", "b", "c"]

    @pytest.mark.parametrize("kept", [-1, -2, -20, -75, -100])
    def test_a_line_cut_short_is_done_again(self, tmp_path, kept):
        path = tmp_path / "out.jsonl"
        write(path, good("a"), good("b", "Schön."))
        path.write_bytes(path.read_bytes()[:kept])
        done = write(path, resume=True).done
        # Without its line end, a record is whole all the same.
        assert done == ({"a", "b"} if kept == -1 else {"a"})
        write(path, *(good(name) for name in {"a", "b", "c"} - done), resume=True)
        assert sorted(images(path)) == ["a", "b", "c"]

    def test_an_older_answer_outlives_a_newer_failure(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, good("a"), bad("a"))
        assert write(path, resume=True, images=()).done == {"a"}
        assert [line["answer"] for line in lines(path)] == ["An answer."]

    @pytest.mark.parametrize(
        "content",
        ["hello", "hello\n", "[1]\n", '{"image": 1, "answer": 2}\n', '{"a"\n{"image": "a"}\n'],
    )
    def test_a_file_of_something_else_is_not_touched(self, tmp_path, content):
        path = tmp_path / "out.jsonl"
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"Line 1 of .* is no result"):
            write(path, good("a"), resume=True)
        assert path.read_text() == content

    def test_a_run_that_is_broken_off_says_how_it_goes_on(self, tmp_path):
        path = tmp_path / "out.jsonl"
        assert break_off(path) == []
        told = [f"What was done is in {path}: go on with --resume."]
        assert break_off(path, good("a")) == told
        assert break_off(path, resume=True) == []  # It has not come to anything.
        assert break_off(path, good("b"), resume=True) == told
        assert images(path) == ["a", "b"]

    def test_a_device_is_refused(self, tmp_path):
        if not Path("/dev/zero").exists():
            pytest.skip("no devices here")
        (tmp_path / "out.jsonl").symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match="not a regular file"):
            write(tmp_path / "out.jsonl", good("a"))

    def test_a_name_that_is_no_text_is_found_again(self, tmp_path):
        path, odd = tmp_path / "out.jsonl", "caf\udce9.png"
        write(path, good(odd))
        assert write(path, resume=True, images=[odd]).done == {odd}


class TestJsonObject:
    def test_one_object_appears_at_the_end(self, tmp_path):
        path = tmp_path / "out.json"
        with open_results(path, resume=False, images=["ä", "b", "c"]) as results:
            results.add(bad("b"))
            results.add(good("ä", "Überall…"))
            assert list(tmp_path.iterdir()) == []
        written = json.loads(path.read_text(encoding="utf-8"))
        assert list(written.items()) == [("ä", "Überall…"), ("b", None)]
        assert "Überall…" in path.read_text(encoding="utf-8")
        assert list(tmp_path.iterdir()) == [path]

    def test_a_whole_result_replaces_an_older_one(self, tmp_path):
        path = tmp_path / "out.json"
        write(path, good("a"))
        write(path, good("b"))
        assert json.loads(path.read_text()) == {"b": "An answer."}

    def test_half_a_result_is_written_too(self, tmp_path):
        path = tmp_path / "out.json"
        notes = break_off(path, good("a"))
        assert json.loads(path.read_text()) == {"a": "An answer."}
        assert notes == [f"What was done is in {path}."]

    def test_half_a_result_replaces_nothing(self, tmp_path):
        path = tmp_path / "out.json"
        write(path, good("a"), good("b"))
        break_off(path, good("a", "Another answer."))
        assert len(json.loads(path.read_text())) == 2
        partial = json.loads((tmp_path / "out.partial.json").read_text())
        assert partial == {"a": "Another answer."}

    def test_no_answer_at_all_writes_nothing(self, tmp_path):
        break_off(tmp_path / "out.json", bad("a"))
        assert list(tmp_path.iterdir()) == []

    def test_when_writing_fails_the_older_file_stays(self, tmp_path, monkeypatch):
        path = tmp_path / "out.json"
        write(path, good("a"))

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ConfigError, match=r"out\.json cannot be written \(No space left"):
            write(path, good("b"))
        assert json.loads(path.read_text()) == {"a": "An answer."}
        assert list(tmp_path.iterdir()) == [path]

    def test_a_linked_file_stays_linked(self, tmp_path):
        try:
            (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
        except OSError:
            pytest.skip("no symbolic links here")
        write(tmp_path / "link.json", good("a"))
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "real.json").read_text()) == {"a": "An answer."}


class TestCoco:
    def boxed(self, image, *boxes):
        return Record(
            image=image, answer="x", boxes=boxes, picture_size=(640, 480), finish_reason="stop",
            seconds=0.5,
        )  # fmt: skip

    def test_boxes_become_annotations(self, tmp_path):
        path = tmp_path / "out.coco.json"
        cat, dog = Box("cat", (10, 20, 40, 60), 0, 9), Box("a dog", (0, 0, 640, 480), 9, 20)
        plain = Box(None, (5, 5, 5, 9), 20, 30)
        write(path, self.boxed("b", dog, cat), bad("c"), self.boxed("a", cat, plain))
        assert json.loads(path.read_text()) == {
            "images": [
                {"id": 1, "file_name": "a", "width": 640, "height": 480},
                {"id": 2, "file_name": "b", "width": 640, "height": 480},
            ],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 20, 30, 40], "area": 1200,
                 "iscrowd": 0},
                {"id": 2, "image_id": 1, "category_id": 3, "bbox": [5, 5, 0, 4], "area": 0,
                 "iscrowd": 0},
                {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 640, 480],
                 "area": 307200, "iscrowd": 0},
                {"id": 4, "image_id": 2, "category_id": 2, "bbox": [10, 20, 30, 40], "area": 1200,
                 "iscrowd": 0},
            ],
            "categories": [
                {"id": 1, "name": "a dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "object"},
            ],
        }  # fmt: skip

    def test_half_of_it_keeps_the_older_file(self, tmp_path):
        path = tmp_path / "out.coco.json"
        write(path, self.boxed("a"), self.boxed("b"))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
            with open_results(path, resume=False, images=["a"]) as results:
                results.add(self.boxed("a"))
                raise KeyboardInterrupt
        assert len(json.loads(path.read_text())["images"]) == 2
        partial = json.loads((tmp_path / "out.partial.coco.json").read_text())
        assert len(partial["images"]) == 1

    def test_picture_sizes_and_boxes_come_as_json(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, self.boxed("a", Box("cat", (10, 20, 40, 60), 3, 12)))
        (line,) = lines(path)
        assert line["boxes"] == [{"label": "cat", "box": [10, 20, 40, 60], "start": 3, "stop": 12}]
        assert line["picture_size"] == [640, 480]
