"""Where two answers part and how alike they are, exactly."""

import json
import random

import pytest

from minigpt4_runtime.evaluation import parity
from minigpt4_runtime.evaluation.answers import Answer, Case, LineUp
from minigpt4_runtime.report.ledger import Ledger

RUNS = ("float32", "int8")


def compare(*pairs, judge=None, ledger=None, images_dir=None):
    cases = tuple(Case(f"{number}.png", pair) for number, pair in enumerate(pairs))
    return parity.compare(
        LineUp(RUNS, cases), judge=judge, images_dir=images_dir,
        ledger=ledger or Ledger(None, keys=parity.LEDGER_KEYS),
    )  # fmt: skip


def texts(reference, candidate):
    return Answer(reference), Answer(candidate)


@pytest.mark.parametrize(
    ("reference", "candidate", "num_equal"),
    [
        ("A dog runs.", "A dog runs.", None),
        ("A dog runs.", "A dog sits.", 2),
        ("A dog runs.", "A dog runs", 3),
        ("A dog", "A dog runs.", 2),
        ("", "A dog", 0),
        ("A dog, brown.", "A dog; brown.", 2),
        ("A  dog", "A dog", 2),
    ],
)
def test_where_words_part(reference, candidate, num_equal):
    (pair,) = compare(texts(reference, candidate)).pairs
    assert pair.num_equal == num_equal


def test_tokens_are_taken_where_every_answer_has_them():
    long = Answer("A dog runs.", (7, 8, 9, 2)), Answer("A dog sits.", (7, 8, 8, 2))
    short = Answer("A dog", (7, 8, 2)), Answer("A dogs", (7, 8, 9, 2))
    report = compare(long, short)
    assert report.unit == "tokens"
    assert [pair.num_equal for pair in report.pairs] == [2, 2]
    # Place by place: 7, 8 and 2 of four; 7 and 8 of the longer answer's four.
    assert [pair.agreement for pair in report.pairs] == [0.75, 0.5]
    assert report.mean_agreement == report.as_mapping()["mean_agreement"] == 0.625
    report = compare(long, short, texts("A dog runs.", "A dog sits."))
    assert report.unit == "words"
    assert [pair.num_equal for pair in report.pairs] == [2, 1, 2]


def test_other_ids_of_the_same_text_are_no_change():
    (pair,) = compare((Answer("A dog", (7, 8)), Answer("A dog", (78, 2)))).pairs
    assert pair.num_equal is None
    assert pair.agreement == 0


def edits(one, other):
    """The textbook's table, in full."""
    rows = [[*range(len(other) + 1)]]
    for number, letter in enumerate(one, start=1):
        row = [number]
        for place, another in enumerate(other, start=1):
            above, left, corner = rows[-1][place], row[-1], rows[-1][place - 1]
            row.append(min(above + 1, left + 1, corner + (letter != another)))
        rows.append(row)
    return rows[-1][-1]


def test_the_edit_ratio():
    (pair,) = compare(texts("kitten", "sitting")).pairs
    assert pair.edit_ratio == pytest.approx(1 - 3 / 7)
    draws = random.Random(0)
    for _ in range(200):
        one, other = ("".join(draws.choices("aäb 昇", k=draws.randrange(12))) for _ in range(2))
        (pair,) = compare(texts(one, other)).pairs
        longer = max(len(one), len(other))
        expected = 1 - edits(one, other) / longer if longer else 1.0
        assert pair.edit_ratio == pytest.approx(expected, abs=1e-12)


def test_the_cosine_is_the_judge_s_and_computed_once(judge, tmp_path):
    pair = texts("A dog runs.", "Noise!")
    ledger = Ledger(tmp_path / "parity.jsonl", keys=parity.LEDGER_KEYS)
    report = compare(pair, texts("Same.", "Same."), judge=judge, ledger=ledger)
    one, other = judge.embed_texts([answer.text for answer in pair])
    assert report.pairs[0].cosine == pytest.approx(float(one @ other), abs=1e-6)
    assert report.pairs[1].cosine == 1
    assert report.mean_cosine == pytest.approx((float(one @ other) + 1) / 2, abs=1e-6)

    class Asleep:
        digest = judge.digest

    ledger = Ledger(tmp_path / "parity.jsonl", keys=parity.LEDGER_KEYS)
    assert compare(pair, judge=Asleep(), ledger=ledger).pairs == report.pairs[:1]


@pytest.fixture
def report(images):
    return compare(
        texts("A dog runs in the park.", "A dog runs in the park."),
        texts("A dog runs in the park.", "A dog runs in the rain & mud."),
        texts("A dog.", "<b>Two</b> cats and a bird."),
        texts("Grass.", "Grass."),
        images_dir=images,
    )


def test_the_numbers(report):
    assert report.exact_rate == 0.5
    assert report.first_parting == [5, 0]
    assert report.mean_cosine is None
    heading, columns, row, no_kl, *worst = report.as_text().splitlines()
    assert heading == "int8 against float32"
    assert no_kl.startswith("KL is not known: it takes both models")
    assert columns.endswith("words until they part: median  fewest")
    assert row.split()[:3] == ["4", "2", "50.0%"]
    assert row.split()[-3:] == ["–", "2.5", "0"]
    assert worst == [
        "", "2.png, after 0 words", "- A dog.", "+ <b>Two</b> cats and a bird.",
        "", "1.png, after 5 words", "- park.", "+ rain & mud.",
    ]  # fmt: skip


def test_long_texts_are_shown_from_where_they_part_and_shortened():
    report = compare(texts("The same " * 30 + "dog.", "The same " * 30 + "door " * 30))
    assert report.as_text().splitlines()[-2:] == ["- dog.", "+ " + "door " * 15 + "…"]


def test_the_mapping_and_the_rows(report):
    mapping = json.loads(json.dumps(report.as_mapping()))
    assert mapping["exact_rate"] == 0.5
    assert mapping["num_equal_unit"] == "words"
    assert mapping["pairs"][1]["num_equal"] == 5
    assert len(report.as_rows().rows) == 4


def test_the_page_shows_the_worst_first_with_what_changed(report):
    page = report.as_page()
    assert page.count("<article") == page.count("data:image/jpeg") == 2
    assert page.index("2.png") < page.index("1.png")
    assert "in the <del>park</del>." in page
    assert "in the <ins>rain & mud</ins>.".replace("&", "&amp;") in page
    assert "<b>" not in page
    assert "they part after 5 words" in page


def test_all_the_same(images):
    report = compare(texts("Same.", "Same."))
    assert report.exact_rate == 1
    assert report.as_text().splitlines()[2].split() == [
        "1", "1", "100.0%", "100.0%", "1.0000", "–", "–", "–", "–",
    ]  # fmt: skip
    assert "All answers are the same." in report.as_page()


def test_a_page_stands_without_its_pictures(tmp_path, images):
    for folder in (None, tmp_path):
        page = compare(texts("a", "b"), images_dir=folder).as_page()
        assert "<article" in page
        assert "data:image/jpeg" not in page
