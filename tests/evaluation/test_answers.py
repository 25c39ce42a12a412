"""Answers are read in every layout, lined up by picture, and what does not fit is named."""

import json

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.batch.results import Record, open_results
from minigpt4_runtime.evaluation.answers import (
    Answer,
    line_up,
    line_up_by_name,
    read_runs,
    sampled,
)
from minigpt4_runtime.evaluation.images import find_image


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.jpg", "b.jpg", "sub/a.jpg", "sub/c.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


def texts(lined_up):
    return {case.name: [answer.text for answer in case.answers] for case in lined_up.cases}


class TestReading:
    @pytest.mark.parametrize("name", ["run.json", "run.jsonl"])
    def test_what_describe_writes(self, tmp_path, name):
        path = tmp_path / name
        with open_results(path, resume=False, images=["a", "b"]) as results:
            results.add(Record(image="b", error="It is damaged.", seconds=0.1))
            results.add(Record(image="a", answer="Ä dog.", token_ids=(5, 2), seconds=0.5))
        (run,) = read_runs([path])
        assert run.name == "run"
        ids = (5, 2) if name == "run.jsonl" else None
        assert run.answers == {"a": Answer("Ä dog.", ids), "b": None}

    def test_several_runs_in_one_file(self, write):
        path = write("both.json", {"a": {"GPU": "x", "NPU": "y"}, "b": {"NPU": None}})
        gpu, npu = read_runs([path])
        assert (gpu.name, gpu.answers) == ("GPU", {"a": Answer("x"), "b": None})
        assert (npu.name, npu.answers) == ("NPU", {"a": Answer("y"), "b": None})

    def test_an_answer_outlives_a_failure_and_a_line_cut_short_is_left_out(self, write):
        pairs = ("a", "x"), ("a", None), ("b", None), ("b", "y")
        lines = [json.dumps({"image": image, "answer": answer}) for image, answer in pairs]
        (run,) = read_runs([write("a.jsonl", "\n".join([*lines, '{"image": "c']))])
        assert run.answers == {"a": Answer("x"), "b": Answer("y")}

    def test_a_file_of_one_record(self, write):
        (run,) = read_runs([write("a.jsonl", '{"image": "a", "answer": "x"}\n')])
        assert run.answers == {"a": Answer("x")}

    def test_runs_of_one_name_are_told_apart(self, write):
        paths = [write(name, {"a": "x"}) for name in ("1/out.json", "2/out.json", "other.json")]
        assert [run.name for run in read_runs(paths)] == [
            f"out ({paths[0]})", f"out ({paths[1]})", "other",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("hello\n", "Line 1 of .* is no answer to a picture"),
            ('{"image": "a"}\n{"image": "b"}\n', "Line 1 of .* has no image and answer"),
            ({"a": 1}, "the answer to a is int"),
            ({"a": {"GPU": "x"}, "b": "y"}, "several runs for some pictures, and one for b"),
            ([1], "Line 1 of .* is no answer"),
        ],
    )
    def test_another_layout_is_refused(self, write, content, message):
        with pytest.raises(ConfigError, match=message):
            read_runs([write("a.json", content)])

    def test_a_file_that_is_not_there_or_no_text(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no\.json cannot be read \(No such file"):
            read_runs([tmp_path / "no.json"])
        (tmp_path / "a.png").write_bytes(b"\x89PNG\xff")
        with pytest.raises(ConfigError, match=r"a\.png is not UTF-8 text"):
            read_runs([tmp_path / "a.png"])

    def test_one_file_twice_is_refused(self, write):
        path = write("a.json", {"a": "x"})
        with pytest.raises(ConfigError, match="named twice"):
            read_runs([path, path])


class TestLiningUp:
    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("a.jpg", "a.jpg"),
            ("/data/coco/b.jpg", "b.jpg"),
            ("../elsewhere/sub/a.jpg", "sub/a.jpg"),
            ("C:\\coco\\sub\\c.jpg", "sub/c.jpg"),
            ("c.jpg", None),
            ("sub", None),
            ("", None),
        ],
    )
    def test_a_name_leads_to_a_picture(self, images, name, place):
        assert find_image(images, name) == place

    def test_runs_over_other_folders_are_lined_up(self, images, write):
        runs = read_runs([
            write("x.json", {"/one/sub/a.jpg": "1", "/one/b.jpg": "2"}),
            write("y.json", {"b.jpg": "3", "sub/a.jpg": "4"}),
        ])  # fmt: skip
        lined_up = line_up(runs, images)
        assert lined_up.runs == ("x", "y")
        assert texts(lined_up) == {"b.jpg": ["2", "3"], "sub/a.jpg": ["1", "4"]}
        assert lined_up.left_out == ()

    def test_what_does_not_fit_is_named(self, images, write):
        runs = read_runs([
            write("x.json", {"a.jpg": "1", "b.jpg": "2", "no.jpg": "3"}),
            write("y.json", {"a.jpg": "4", "b.jpg": None, "sub/c.jpg": "5", "no.jpg": "6"}),
        ])  # fmt: skip
        lined_up = line_up(runs, images)
        assert texts(lined_up) == {"a.jpg": ["1", "4"]}
        assert lined_up.left_out == (
            f"The folder {images} lacks 1 picture (no.jpg).",
            "x has no answer to 1 picture (sub/c.jpg).",
            "y has no answer to 1 picture (b.jpg).",
        )

    def test_of_many_only_the_first_are_told(self, images, write):
        answers = {"a.jpg": "1"} | {f"no{number}.jpg": "2" for number in range(7)}
        (sentence,) = line_up(read_runs([write("x.json", answers)]), images).left_out
        assert sentence.endswith(
            "lacks 7 pictures (no0.jpg, no1.jpg, no2.jpg, no3.jpg, no4.jpg, …)."
        )

    def test_two_names_of_one_picture_are_refused(self, images, write):
        runs = read_runs([write("x.json", {"one/a.jpg": "1", "two/a.jpg": "2"})])
        with pytest.raises(ConfigError, match=r"x: one/a\.jpg and two/a\.jpg both lead to"):
            line_up(runs, images)

    def test_nothing_in_common_is_refused_with_the_reason(self, images, write, tmp_path):
        runs = read_runs([write("x.json", {"no.jpg": "1"})])
        with pytest.raises(
            ConfigError, match=r"No picture has an answer .* lacks 1 picture \(no\.jpg\)"
        ):
            line_up(runs, images)
        with pytest.raises(ConfigError, match="there is no such folder"):
            line_up(runs, tmp_path / "nowhere")

    def test_by_name_alone(self, write):
        runs = read_runs([
            write("x.json", {"/data/one/a.jpg": "1", "/data/one/s/b.jpg": "2", "/data/one/c": "3"}),
            write("y.json", {"a.jpg": "4", "s\\b.jpg": "5"}),
        ])  # fmt: skip
        lined_up = line_up_by_name(runs)
        assert texts(lined_up) == {"a.jpg": ["1", "4"], "s/b.jpg": ["2", "5"]}
        assert lined_up.left_out == ("y has no answer to 1 picture (c).",)

    def test_names_that_agree_are_taken_as_they_are(self, write):
        runs = read_runs([write("x.json", {"d/a": "1"}), write("y.json", {"d/a": "2", "e/a": "3"})])
        assert texts(line_up_by_name(runs)) == {"d/a": ["1", "2"]}

    def test_a_sample_of_them(self, images, write):
        answers = {"a.jpg": "1", "b.jpg": "2", "sub/a.jpg": "3", "sub/c.jpg": "4"}
        lined_up = line_up(read_runs([write("x.json", answers)]), images)
        drawn = sampled(lined_up, 2, seed=3)
        assert len(drawn.cases) == 2
        assert set(drawn.cases) < set(lined_up.cases)
        assert sampled(lined_up, 2, seed=3) == drawn
        assert sampled(lined_up, 99, seed=3) == lined_up
