"""The check counts what is exactly right, asks as people do, and can be repeated."""

import random
import re
from dataclasses import replace

import pytest

from minigpt4_runtime.evaluation import demo_check, scenes
from minigpt4_runtime.evaluation.box_scenes import TASKS
from minigpt4_runtime.evaluation.demo_cases import SceneAnswer
from minigpt4_runtime.evaluation.demo_report import DemoReport
from minigpt4_runtime.messages import ImageSource, Reply, Usage, read_messages
from minigpt4_runtime.report.ledger import Ledger


class Oracle:
    """A model that was told every right answer when its question was made up."""

    has_boxes = False

    def __init__(self, monkeypatch):
        self.known, self.wrong, self.asked = {}, set(), []
        real_ask, real_describe = scenes.ask, scenes.describe

        def ask(scene, rng):
            question = real_ask(scene, rng)
            self.known[question.text] = question
            self.scene = scene
            return question

        def describe(scene):
            self.description = real_describe(scene)
            return self.description

        monkeypatch.setattr(scenes, "ask", ask)
        monkeypatch.setattr(scenes, "describe", describe)

    def chat(self, messages, sampling=None):
        assert sampling is None, "the check is greedy"
        turns = read_messages(messages)
        assert isinstance(turns[0].content[0], ImageSource)
        self.asked.append(turns)
        question = self.known.get(turns[-1].content[-1])
        kind = question.kind if question and len(turns) > 1 else "description"
        text = question.answer if kind != "description" else self.description
        return Reply("?" if kind in self.wrong else text, (), "stop", Usage(1, 1))

    def describe(self, picture, prompt):
        assert picture.size == (384, 384)
        return Reply(self.known[prompt].answer, (), "stop", Usage(1, 1))


@pytest.fixture
def oracle(monkeypatch):
    return Oracle(monkeypatch)


def test_all_right(oracle):
    done = []
    report = demo_check.check(oracle, num_scenes=20, seed=3, on_scene=lambda: done.append(1))
    assert len(done) == 20
    assert {name: (s.num_right, s.num_asked) for name, s in report.by_group().items()} == {
        "descriptions": (20, 20),
        "answers in a dialogue": (80, 80),
        "answers at once": (20, 20),
    }
    assert sum(score.num_asked for score in report.by_kind().values()) == 100
    assert all(score.rate == 1 for score in report.by_kind().values())
    assert report.as_mapping()["mistakes"] == []


def test_what_is_wrong_is_counted_where_it_belongs(oracle):
    oracle.wrong = {"description", "where"}
    report = demo_check.check(oracle, num_scenes=20)
    assert report.by_group()["descriptions"].rate == 0
    assert report.by_group()["answers at once"].rate == 1
    kinds = report.by_kind()
    assert 0 <= kinds.pop("where").rate < 1
    assert all(score.rate == 1 for score in kinds.values())
    mapping = report.as_mapping()
    assert mapping["groups"]["descriptions"] == {"asked": 20, "right": 0, "rate": 0.0}
    assert {mistake["given"] for mistake in mapping["mistakes"]} == {"?"}


def test_questions_go_on_in_one_dialogue(oracle):
    demo_check.check(oracle, num_scenes=1)
    assert [len(turns) for turns in oracle.asked] == [1, 3, 5, 7, 9]
    last = oracle.asked[-1]
    assert [turn.role for turn in last] == ["user", "assistant"] * 4 + ["user"]
    assert sum(isinstance(part, ImageSource) for turn in last for part in turn.content) == 1


def test_a_seed_asks_the_same_again(oracle):
    first, again, other = (demo_check.check(oracle, num_scenes=3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.verdicts != other.verdicts


def test_what_the_ledger_has_is_not_asked_again(oracle, tmp_path):
    whole = demo_check.check(oracle, num_scenes=4, seed=1)

    def check(asked_of="float32"):
        oracle.asked.clear()
        ledger = Ledger(tmp_path / "demo.jsonl", keys=demo_check.LEDGER_KEYS)
        report = demo_check.check(oracle, num_scenes=4, seed=1, ledger=ledger, asked_of=asked_of)
        assert report == whole
        return len(oracle.asked)

    assert check() == 20
    assert check() == 0
    path = tmp_path / "demo.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert check() == 5
    assert check("int8") == 20


def test_scenes_are_held_out(oracle, monkeypatch):
    seen = []
    real = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda scene, rng: seen.append(scene) or real(scene, rng))
    demo_check.check(oracle, num_scenes=5)
    assert len(seen) == 5
    assert all(scene.is_held_out for scene in seen)


def test_a_nearly_right_answer_is_wrong():
    verdict = SceneAnswer("descriptions", "description", "?", "Two shapes.", "Two shapes")
    assert not verdict.is_right
    assert replace(verdict, given="Two shapes.").is_right


def test_the_table_names_every_number(oracle):
    oracle.wrong = {"description"}
    table = demo_check.check(oracle, num_scenes=10).as_table()
    assert table.startswith("10 scenes held out of training (seed 0)\n")
    assert "descriptions                  10      0     0.0%" in table
    assert "answers in a dialogue         40     40   100.0%" in table


def test_every_question_has_a_kind():
    rng = random.Random(0)
    kinds = {scenes.ask(scenes.random_scene(rng, held_out=True), rng).kind for _ in range(500)}
    assert len(kinds) == len(set(scenes._QUESTIONS))


class BoxOracle:
    """Tells each box a little too far to the right, and every other number as it is."""

    has_boxes = True

    def __init__(self, cases):
        self.cases, self.asked = cases, []

    def describe(self, picture, prompt, *, task):
        self.asked.append(task)
        known = [each for case in self.cases for each in case.asked
                 if (each.task, each.question) == (task, prompt)
                 and case.image.tobytes() == picture.tobytes()]  # fmt: skip
        shifted = re.sub(
            r"\{<(\d+)>(.*?)<(\d+)><(\d+)>\}",
            lambda m: f"{{<{int(m[1]) + 1}>{m[2]}<{int(m[3]) + 1}><{m[4]}>}}",
            known[0].expected,
        )
        return Reply(shifted, (), "stop", Usage(1, 1))


def test_a_model_that_writes_boxes_is_asked_each_task_and_may_be_a_little_off():
    oracle = BoxOracle(list(demo_check.draw_cases(6, 2, with_boxes=True)))
    report = demo_check.check(oracle, num_scenes=6, seed=2)
    assert oracle.asked == [*TASKS] * 6
    groups = report.by_group()
    assert [*groups] == [*TASKS]
    assert groups["refer"].rate == groups["grounding"].rate == 0
    assert all(score.near_rate == 1 for score in groups.values())
    assert groups["caption"].rate == groups["identify"].rate == 1
    # A task that has one sort of question has no row of its own there.
    assert sum(score.num_asked for score in report.by_kind().values()) == 6
    assert "refer                          6      0     0.0%      100.0%" in report.as_table()
    mapping = report.as_mapping()
    assert mapping["groups"]["refer"] == {"asked": 6, "right": 0, "rate": 0.0, "near": 6}
    page = DemoReport(report, "model demo-boxes").as_page()
    assert "IoU ≥ 0.5" in page
    assert page.count("<article") == sum(not verdict.is_right for verdict in report.verdicts)
