"""The studies of docs/studying.md run as they stand there, and show what they promise."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/studying.md").read_text(encoding="utf-8")
STUDIES = dict(
    re.findall(r"^## ([^\n]+)\n[^#]*?```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
)


@pytest.fixture
def run(monkeypatch, capsys):
    def run_study(name):
        monkeypatch.chdir(ROOT)
        exec(compile(STUDIES[name], name, "exec"), {})
        return capsys.readouterr().out.splitlines()

    return run_study


def test_there_are_four_and_they_are_short():
    assert list(STUDIES) == [
        "Contrastive decoding", "Robustness", "The logit lens", "Many pictures at once",
    ]  # fmt: skip
    for study in STUDIES.values():
        assert 10 <= sum(1 for line in study.splitlines() if line.strip()) <= 20


def test_contrastive_decoding(run):
    clean, noisy, contrasted = (
        line.partition(":")[2].strip() for line in run("Contrastive decoding")
    )
    assert clean.startswith("There are three shapes")
    assert noisy != clean
    assert contrasted.startswith("There are three shapes")


def test_robustness(run):
    clean, *perturbed = run("Robustness")
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in perturbed]
    assert losses == sorted(losses)
    assert perturbed[-1].partition(": ")[2] != clean.partition(": ")[2]


def test_the_lens(run):
    lines = run("The logit lens")
    assert [line.split()[0] for line in lines[:3]] == ["There", "are", "three"]
    layers = {int(re.search(r"from layer (\d+)", line)[1]) for line in lines}
    # Words are found behind different layers, and all of them in the end.
    assert len(layers) > 1
    assert layers <= set(range(7))
    shares = [int(re.search(r"(\d+)% on", line)[1]) for line in lines]
    assert 0 < max(shares) <= 100


def test_many_pictures(run):
    *described, scores = run("Many pictures at once")
    counts = {"one": "is one", "two": "are two", "three": "are three", "four": "are four"}
    found = dict(line.split(".png: ") for line in described)
    assert found.keys() == counts.keys()
    assert all(f"There {count} shape" in found[name] for name, count in counts.items())
    assert scores.startswith("scores: (-")


def test_every_program_has_its_row():
    programs = {path.name for path in (ROOT / "examples/study").glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)` \|", PAGE, re.MULTILINE)) == programs
