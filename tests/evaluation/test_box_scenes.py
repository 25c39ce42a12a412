"""Boxes of drawn scenes: around what is drawn, asked for by one phrase, and judged by overlap."""

import random

import numpy as np
import pytest

from minigpt4_runtime.evaluation import box_scenes, scenes
from minigpt4_runtime.evaluation.box_scenes import PlacedScene
from minigpt4_runtime.evaluation.scenes import Outline, Scene, Shape
from minigpt4_runtime.text.boxes import find_boxes


def placed_scene(seed):
    rng = random.Random(seed)
    scene = scenes.random_scene(rng, held_out=False)
    return PlacedScene(scene, scenes.place_shapes(scene, rng)), rng


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_a_box_lies_around_what_is_drawn(kind):
    rng = random.Random(kind)
    scene = Scene((Shape(kind, "blue", "large", rng.randrange(9)),), "white")
    outlines = scenes.place_shapes(scene, rng)
    (box,) = PlacedScene(scene, outlines).boxes
    drawn = np.asarray(scenes.draw(scene, rng, outlines=outlines, side=800).convert("L"))
    rows, columns = np.nonzero(drawn < 200)
    seen = columns.min(), rows.min(), columns.max(), rows.max()
    assert box == pytest.approx([number / 8 for number in seen], abs=0.8)


def test_every_answer_holds_the_boxes_of_what_it_names():
    for seed in range(60):
        placed, rng = placed_scene(seed)
        boxes = dict(
            zip((shape.phrase for shape in placed.scene.shapes), placed.boxes, strict=True)
        )
        for task in ("grounding", "detection"):
            question = box_scenes.ask(placed, task, rng)
            for found in find_boxes(question.answer, (100, 100)):
                words = set(found.label.split()) - {"a", "shape"}
                assert found.box in [
                    box for shape, box in zip(placed.scene.shapes, placed.boxes, strict=True)
                    if words <= set(shape.phrase.split())
                ]  # fmt: skip
        # What is left without boxes is the description.
        bare = question_without_boxes(box_scenes.ask(placed, "grounding", rng).answer)
        assert bare == scenes.describe(placed.scene)
        (found,) = find_boxes(box_scenes.ask(placed, "refer", rng).answer, (100, 100))
        assert found.box in boxes.values()


def question_without_boxes(answer):
    for found in reversed(find_boxes(answer, (100, 100))):
        answer = answer[: found.start - 1] + answer[found.stop :]
    return answer.replace("<p>", "").replace("</p>", "")


def test_a_phrase_to_refer_to_means_one_shape():
    star, other = Shape("star", "red", "small", 0), Shape("star", "red", "large", 4)
    twin, lone = Shape("star", "red", "small", 8), Shape("ring", "red", "small", 6)
    scene = Scene((star, other, lone, twin), "white")
    phrases = {box_scenes._name(scene, i, random.Random(s)) for i in range(4) for s in range(40)}
    assert {"small red star at the top left", "small red star at the bottom right"} <= phrases
    assert {"large star", "ring"} <= phrases
    assert not phrases & {"star", "red star", "small star", "red shape", "small red star"}


def test_what_is_not_there_is_not_detected():
    texts = {
        question.text: question.answer
        for seed in range(200)
        for placed, rng in [placed_scene(seed)]
        for question in [box_scenes.ask(placed, "detection", rng)]
        if "<p>" not in question.answer
    }
    assert texts
    assert all(answer == f"There is no {text}." for text, answer in texts.items())


def test_a_box_that_is_asked_about_is_near_its_shape():
    for seed in range(30):
        placed, rng = placed_scene(seed)
        question = box_scenes.ask(placed, "identify", rng)
        (asked,) = find_boxes(question.text, (100, 100))
        near = [shape.phrase for shape, box in zip(placed.scene.shapes, placed.boxes, strict=True)
                if max(abs(a - b) for a, b in zip(box, asked.box, strict=True)) <= 2]  # fmt: skip
        assert near == [question.answer]


@pytest.mark.parametrize(
    ("given", "is_near"),
    [
        ("<p>star</p> {<10><10><30><30>}", True),
        ("<p>star</p> {<13><10><33><30>}", True),
        ("<p>star</p> {<18><10><38><30>}", False),  # 12 of 28 columns in common.
        ("<p>stars</p> {<10><10><30><30>}", False),
        ("<p>star</p> {<10><10><30><30>}<delim>{<10><10><30><30>}", False),
        ("<p>star</p> {<30><10><10><30>}", False),
        ("<p>star</p>", False),
    ],
)
def test_an_answer_is_near_if_its_words_are_right_and_its_boxes_overlap_by_half(given, is_near):
    assert box_scenes.is_near(given, "<p>star</p> {<10><10><30><30>}") is is_near


def test_held_out_scenes_have_a_question_of_each_task():
    rng = random.Random(4)
    placed = PlacedScene(
        Scene((Shape("ring", "blue", "small", 0),), "grey"), (Outline(0.15, 0.16, 0.07),)
    )
    kinds = {box_scenes.ask(placed, task, rng).kind for task in box_scenes.TASKS}
    assert set(box_scenes.TASKS) - kinds == {"vqa"}
