"""The report counts what the check counted, shows mistakes, and measures against an earlier one."""

import json
from dataclasses import replace

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation.demo_cases import draw_cases
from minigpt4_runtime.evaluation.demo_check import DemoCheck
from minigpt4_runtime.evaluation.demo_report import DemoReport, read_earlier


def make_report(num_wrong=0, **settings):
    """A check of five scenes in which the first so many of thirty answers are wrong."""
    asked = [verdict for case in draw_cases(5, seed=3) for verdict in case.asked]
    verdicts = tuple(
        replace(verdict, given="<no>" if number < num_wrong else verdict.expected)
        for number, verdict in enumerate(asked)
    )
    return DemoReport(DemoCheck(5, 3, verdicts), "model demo, dtype float32", **settings)


def test_a_row_for_each_group_and_kind():
    report = make_report(6)
    rows = {row[0]: row[1:] for row in report.table().rows}
    assert rows["descriptions"] == (5, 4, 0.8)
    assert rows["answers in a dialogue"] == (20, 16, 0.8)
    assert rows["answers at once"] == (5, 4, 0.8)
    kinds = [row for name, row in rows.items() if name in report.check.by_kind()]
    assert sum(asked for asked, _, _ in kinds) == 25
    assert sum(right for _, right, _ in kinds) == 20
    assert report.as_text().startswith("5 scenes held out of training (seed 3)\n")


def test_the_page_shows_the_scenes_of_the_mistakes():
    page = make_report(7).as_page()
    assert page.count("<article") == page.count("data:image/jpeg") == 7
    assert page.count("&lt;no&gt;") == 7
    cards = page[page.index("<article") :].split("<article")
    # Six questions are about the first scene, the seventh about the second.
    pictures = [card.partition("base64,")[2].partition('"')[0] for card in cards[1:]]
    assert len(set(pictures[:6])) == 1
    assert pictures[6] != pictures[0]
    assert "All answers are right." in make_report().as_page()


def test_against_an_earlier_report(tmp_path):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(make_report(6).as_mapping()))
    before = read_earlier(path, num_scenes=5, seed=3)
    report = make_report(before=before)
    rows = {row[0]: row[1:] for row in report.table().rows}
    asked, right, rate, earlier, points = rows["descriptions"]
    assert (asked, right, rate, earlier) == (5, 5, 1, 0.8)
    assert points == pytest.approx(20)
    assert "80.0%   +20.0\n" in report.as_text()
    assert "Dots: before." in report.as_page()


@pytest.mark.parametrize("content", ["{}", "no json", "[1]", '{"groups": 1, "kinds": 2}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json is no demo\.json"):
        read_earlier(tmp_path / "a.json", num_scenes=5, seed=3)


def test_other_scenes_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(make_report().as_mapping()))
    with pytest.raises(ConfigError, match="is about 5 scenes of seed 3, not 5 of seed 4"):
        read_earlier(tmp_path / "a.json", num_scenes=5, seed=4)


def test_rows_hold_every_answer():
    rows = make_report(1).as_rows().rows
    assert len(rows) == 30
    assert [row[2] for row in rows] == [0] + [1] * 29
