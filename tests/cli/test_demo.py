"""`minigpt4 demo`: one scene to look at, or many to judge by."""

import json

import pytest
from PIL import Image

ONE = ("demo", "--seed", "7")


def test_one_scene_is_described_and_asked_about(minigpt4, folder):
    shown = minigpt4(*ONE)
    assert shown.status == 0
    assert shown.err == "A scene held out of training; --seed 7 draws it again.\n"
    questions = [line for line in shown.out.splitlines() if line.startswith("> ")]
    assert len(questions) == 5
    # The fake model is wrong about everything; the truth is shown.
    assert shown.out.count("(right would be: ") == 5
    assert minigpt4(*ONE).out == shown.out


def test_without_a_seed_scenes_differ_and_can_be_had_again(minigpt4, folder):
    first, second = minigpt4("demo"), minigpt4("demo")
    assert first.err != second.err
    seed = first.err.split("--seed ")[1].split()[0]
    assert minigpt4("demo", "--seed", seed).out == first.out


@pytest.mark.parametrize("name", ["scene.png", "scene.JPG"])
def test_the_picture_can_be_kept(minigpt4, folder, name):
    shown = minigpt4(*ONE, "--save", name)
    assert shown.status == 0
    assert f"The picture is in {name}." in shown.err
    with Image.open(folder / name) as picture:
        assert picture.size == (384, 384)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", "which exists. Give another name."),
        ("scene.txt", "must end with .png or .jpg"),
        ("nowhere/scene.png", "cannot be written"),
    ],
)
def test_a_picture_that_cannot_be_kept(minigpt4, folder, name, message):
    before = (folder / "a.png").read_bytes()
    shown = minigpt4(*ONE, "--save", name)
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert (folder / "a.png").read_bytes() == before


def test_check_prints_the_rates(minigpt4):
    shown = minigpt4("demo", "--check", "--scenes", "3")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.startswith("3 scenes held out of training (seed 0)\n")
    assert "descriptions" in shown.out


def test_check_for_programs(minigpt4):
    shown = minigpt4("demo", "--check", "--scenes", "2", "--seed", "5", "--json")
    report = json.loads(shown.out)
    assert (report["num_scenes"], report["seed"]) == (2, 5)
    assert report["groups"]["answers in a dialogue"]["asked"] == 8
    assert len(report["mistakes"]) == 12


@pytest.mark.parametrize("arguments", [("--scenes", "0"), ("--scenes", "many")])
def test_so_many_scenes_cannot_be(minigpt4, arguments):
    assert minigpt4("demo", "--check", *arguments).status == 2
