"""Scores are the judge's, each is computed once, and the report says what they come to."""

import csv
import io
import json

import pytest
from PIL import Image

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation import clip
from minigpt4_runtime.evaluation.answers import line_up, read_runs
from minigpt4_runtime.evaluation.clip import ClipReport, ScoredAnswer, ScoredCase
from minigpt4_runtime.report.ledger import Ledger

LONG = "There are words without end. " * 9


@pytest.fixture
def lined_up(images, tmp_path):
    """Three runs over ten pictures; the second says the same of the first five."""
    runs = {
        f"{number}.png": {
            "GPU": f"Picture {number}.",
            "NPU": f"Picture {number}." if number < 5 else f"Noise, {number} of it!",
            "long": LONG + str(number),
        }
        for number in range(10)
    }
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(runs))
    return line_up(read_runs([path]), images)


def score(lined_up, judge, images, ledger=None):
    return clip.score(
        lined_up, judge, ledger or Ledger(None, keys=clip.LEDGER_KEYS), images_dir=images
    )


def test_every_score_is_the_cosine(lined_up, judge, images):
    report = score(lined_up, judge, images)
    assert [case.name for case in report.cases] == [f"{number}.png" for number in range(10)]
    for case in report.cases:
        picture = judge.embed_images([Image.open(images / case.name).convert("RGB")])[0]
        for answer in case.answers:
            (text,) = judge.embed_texts([answer.text])
            assert answer.score == pytest.approx(float(picture @ text), abs=2e-6)
            assert answer.is_cut == answer.text.startswith(LONG)


def test_the_same_answer_ties_exactly(lined_up, judge, images):
    compared = score(lined_up, judge, images).comparisons["NPU"]
    assert compared.ties == 5
    assert compared.wins + compared.losses == 5


def test_only_what_is_longer_than_the_judge_reads_is_cut(images, tmp_path, judge):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"1.png": "x" * 75, "2.png": "x" * 76}))
    report = score(line_up(read_runs([path]), images), judge, images)
    assert [case.answers[0].is_cut for case in report.cases] == [False, True]
    assert report.num_cut == (1,)


def test_a_picture_that_cannot_be_read_is_named_and_left_out(images, tmp_path, judge):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"bad.png": "x", "1.png": "y", "no.png": "z"}))
    report = score(line_up(read_runs([path]), images), judge, images)
    assert [case.name for case in report.cases] == ["1.png"]
    missing, bad = report.left_out
    assert missing == f"The folder {images} lacks 1 picture (no.png)."
    assert "bad.png is damaged" in bad
    path.write_text(json.dumps({"bad.png": "x"}))
    with pytest.raises(ConfigError, match=r"No picture could be judged\. .*bad\.png is damaged"):
        score(line_up(read_runs([path]), images), judge, images)


class Counting:
    """A judge that counts what it is asked, and breaks off after so many pictures."""

    def __init__(self, judge, breaks_after=99):
        self._judge = judge
        self.num_pictures, self._breaks_after = 0, breaks_after

    def __getattr__(self, name):
        return getattr(self._judge, name)

    def embed_images(self, pictures):
        if self.num_pictures >= self._breaks_after:
            raise KeyboardInterrupt
        self.num_pictures += len(pictures)
        return self._judge.embed_images(pictures)


def test_what_was_scored_is_not_scored_again(lined_up, judge, images, tmp_path):
    path = tmp_path / "clip.jsonl"
    whole = score(lined_up, judge, images)
    ledger = Ledger(path, keys=clip.LEDGER_KEYS)
    with pytest.raises(KeyboardInterrupt):
        score(lined_up, Counting(judge, breaks_after=8), images, ledger)
    assert len(path.read_text().splitlines()) == 19  # Eight pictures, five answers given twice.
    ledger = Ledger(path, keys=clip.LEDGER_KEYS)
    counting = Counting(judge)
    assert score(lined_up, counting, images, ledger) == whole
    assert counting.num_pictures == 2
    # A picture of another content under the same name is another picture.
    Image.new("RGB", (50, 50), "red").save(images / "3.png")
    ledger = Ledger(path, keys=clip.LEDGER_KEYS)
    counting = Counting(judge)
    assert score(lined_up, counting, images, ledger).cases[3] != whole.cases[3]
    assert counting.num_pictures == 1


def test_progress_counts_every_picture(lined_up, judge, images):
    done = []
    clip.score(
        lined_up, judge, Ledger(None, keys=clip.LEDGER_KEYS), images_dir=images,
        on_image=lambda: done.append(1),
    )  # fmt: skip
    assert len(done) == 10


def case(name, *scores):
    return ScoredCase(name, tuple(ScoredAnswer(f"{s}", s, s > 0.4) for s in scores))


@pytest.fixture
def report(images):
    cases = (case("0.png", 0.25, 0.5), case("1.png", 0.25, 0.25), case("2.png", 0.5, 0.25),
             case("3.png", 0.0, 0.5))  # fmt: skip
    return ClipReport(("GPU", "<NPU>"), cases, ("The folder y lacks x.png.",), images, 77)


def test_the_numbers(report):
    assert report.means == (0.25, 0.375)
    assert report.num_cut == (1, 2)
    compared = report.comparisons["<NPU>"]
    assert (compared.wins, compared.ties, compared.losses) == (2, 1, 1)
    assert compared.mean_difference == 0.125
    assert compared.low < 0.125 < compared.high


def test_the_text(report):
    means, _, compared = report.as_text().partition("\n\n")
    assert means.splitlines() == [
        "run      mean  pictures  over 77 tokens",
        "GPU    0.2500         4               1",
        "<NPU>  0.3750         4               2",
    ]
    assert compared.splitlines()[1].split()[:5] == ["<NPU>", "2", "1", "1", "+0.1250"]


def test_the_mapping_and_the_rows_hold_everything(report):
    mapping = json.loads(json.dumps(report.as_mapping()))
    assert mapping["runs"]["GPU"] == {"mean": 0.25, "pictures": 4, "cut": 1}
    assert mapping["comparisons"]["<NPU>"]["wins"] == 2
    assert mapping["pictures"]["3.png"]["<NPU>"] == {"text": "0.5", "score": 0.5, "is_cut": True}
    assert mapping["left_out"] == ["The folder y lacks x.png."]
    rows = list(csv.DictReader(io.StringIO(report.as_rows().as_csv())))
    assert len(rows) == 8
    assert rows[1] == {"image": "0.png", "run": "<NPU>", "score": "0.5", "is_cut": "1",
                       "answer": "0.5"}  # fmt: skip


def test_the_page_shows_the_widest_gap_first(report):
    page = report.as_page()
    assert page.count("<article") == page.count("data:image/jpeg") == 4
    places = [page.index(f"<h3>{name}.png · gap") for name in "3021"]
    assert places == sorted(places)
    assert "&lt;NPU&gt; · 0.5000 · cut at 77 tokens" in page
    assert "<NPU>" not in page
    assert page.count("data:image/svg+xml") == 4  # Two plots, each for light and dark.
    assert page.count('class="best"') == 3  # A tie has no winner.


def test_a_single_run_shows_its_worst_answers(images):
    report = ClipReport(("GPU",), (case("0.png", 0.3), case("1.png", 0.1)), (), images, 77)
    assert "against" not in report.as_text()
    page = report.as_page()
    assert page.index("<h3>1.png") < page.index("<h3>0.png")
    assert page.count("data:image/svg+xml") == 2
