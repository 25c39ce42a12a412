"""Recipes: the bundled ones are read, and pictures are drawn as published."""

import random
import tomllib

import pytest

from minigpt4_runtime import ConfigError, SamplingParams
from minigpt4_runtime.evaluation.pope_report import READINGS
from minigpt4_runtime.evaluation.recipe import RECIPES_DIR, PictureChoice, Recipe, Run

NAMES = ("halc", "opera", "pai", "vlmevalkit")
WHOLE = """
source = "mine"
[captions]
prompt = { value = "Describe.", source = "mine" }
max_new_tokens = { value = 5, source = "mine" }
"""


def test_the_bundled_recipes():
    assert tuple(sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))) == NAMES
    for name in NAMES:
        recipe = Recipe.read(name)
        for task, run in recipe.runs.items():
            assert run.reading in READINGS
            assert run.differs, "none of these runs can be repeated to the letter"
            assert task == "captions" or "{question}" in run.prompt


def test_what_opera_does():
    run = Recipe.read("opera").run("captions")
    assert run.is_raw
    assert run.sampling == SamplingParams(max_new_tokens=512, num_beams=5)
    assert run.pictures == PictureChoice(500, 42, "shuffle", "names")
    assert run.trim("Assistant: So.Assistant: A dog. ") == "A dog."
    assert Recipe.read("opera").run("pope").reading == "all-words"


def test_cuts():
    plain = {"prompt": "", "sampling": SamplingParams()}
    answer = "Assistant: A cat. An <unk> dog. A hat"
    assert Run(**plain, cut=("after-assistant",)).trim(answer) == "A cat. An <unk> dog. A hat"
    # As the published lines do it, whatever else contains "unk".
    assert Run(**plain, cut=("without-unk",)).trim("A trunk. A cat.") == " A cat."
    assert Run(**plain, cut=("after-assistant", "without-unk", "finished")).trim(answer) == "A cat."
    assert Run(**plain).trim(answer) == answer


def test_pictures_are_drawn_as_the_scripts_draw():
    names = [f"{number}.jpg" for number in range(40)]
    random.seed(42)
    shuffled = list(names)
    random.shuffle(shuffled)
    assert PictureChoice(5, 42).choose(names) == shuffled[:5]
    random.seed(42)
    assert PictureChoice(5, 42, "sample").choose(names) == random.sample(names, 5)
    assert PictureChoice(40, 42).choose(names) == names


def test_what_is_typed_counts():
    run = Recipe.read("pai").run("pope")
    usual = Run(prompt="{question}", sampling=SamplingParams(max_new_tokens=40))
    assert run.altered(usual, usual) == (run, ())
    typed = Run(
        prompt="{question}?", sampling=SamplingParams(max_new_tokens=9), reading="substring"
    )
    altered, names = run.altered(typed, usual)
    assert names == ("prompt", "reading", "max_new_tokens")
    assert (altered.prompt, altered.reading) == ("{question}?", "substring")
    assert altered.sampling.max_new_tokens == 9
    assert altered.cut == run.cut


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "is not TOML"),
        ('source = "mine"', "needs a source and tables"),
        (WHOLE.replace("[captions]", "[poem]"), "needs a source and tables"),
        (WHOLE.replace('{ value = 5, source = "mine" }', "5"), "max_new_tokens is 5. Write"),
        (WHOLE.replace('5, source = "mine"', '5, source = ""'), "Write { value"),
        (WHOLE + 'top_z = { value = 1, source = "mine" }', "'top_z', which is no setting"),
        (WHOLE + 'cut = { value = ["all"], source = "mine" }', "cut is ['all']"),
        (WHOLE + 'pictures = { value = 5, source = "mine" }', "a choice of pictures is"),
        (WHOLE.replace("max_new", "min_new"), "'min_new_tokens', which is no setting"),
        (WHOLE.replace('value = "Describe."', "value = 3"), "needs a prompt"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        Recipe.read(str(tmp_path / "mine.toml"))
    assert message in str(error.value)


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(WHOLE)
    recipe = Recipe.read(str(tmp_path / "mine.toml"))
    assert recipe.run("captions") == Run(
        prompt="Describe.", sampling=SamplingParams(max_new_tokens=5)
    )
    with pytest.raises(ConfigError, match=r"mine says nothing of pope, only of captions\."):
        recipe.run("pope")
    with pytest.raises(ConfigError, match=r"no recipe opra\. Give halc, opera, pai"):
        Recipe.read("opra")


def test_each_value_of_a_bundled_file_names_a_place():
    for path in RECIPES_DIR.glob("*.toml"):
        table = tomllib.loads(path.read_text())
        assert " at " in table.pop("source")
        entries = [
            entry
            for task in table.values()
            for part in task.values()
            for entry in (part if isinstance(part, list) else [part])
        ]
        assert all(entry["source"] for entry in entries)
