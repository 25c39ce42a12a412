"""The bundled demo model: small, whole, and right about scenes it was never shown."""

import random
from pathlib import Path

import pytest

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.evaluation import demo_check, scenes

IMAGES = Path(__file__).parent.parent / "examples" / "images"


@pytest.fixture(scope="module")
def model() -> MiniGPT4:
    return MiniGPT4.load(device="cpu")


def test_it_is_small_and_of_the_vicuna_variant(model):
    size = sum(path.stat().st_size for path in DEMO_MODEL_DIR.iterdir())
    assert size <= 12 * 2**20
    assert model.config.template == "vicuna"
    assert model.config.qformer is not None


def test_it_is_right_about_most_scenes_it_was_never_shown(model):
    report = demo_check.check(model, num_scenes=12, seed=1)
    # The rates of 500 scenes are in docs/demo-model.md; so few scatter more.
    assert all(score.rate >= 0.85 for score in report.by_group().values()), report.as_table()


def test_it_describes_the_example_pictures(model):
    counts = {"one": "one shape", "two": "two shapes", "three": "three shapes", "four": "four"}
    for name, words in counts.items():
        assert words in model.describe(IMAGES / f"{name}.png").text


def test_the_question_may_stand_before_its_picture(model):
    picture = {"type": "image_url", "image_url": {"url": str(IMAGES / "three.png")}}
    question = {"type": "text", "text": "How many shapes are there?"}
    replies = [
        model.chat([{"role": "user", "content": content}]).text
        for content in ([picture, question], [question, picture])
    ]
    assert "three" in replies[0].lower()
    assert replies[1] == replies[0]


def test_any_text_can_be_typed(model):
    for text in ("你好，图片里有什么？", "🙂🙂", "a\tb\nc   d", "", "</s><s>###"):
        prompt = model.encode_prompt([{"role": "user", "content": text}])
        assert text in model._tokenizer.decode(prompt.token_ids)


def test_the_same_sizes_of_picture_give_the_same_answer(model):
    scene = scenes.random_scene(random.Random(5), held_out=True)
    answers = {
        model.describe(scenes.draw(scene, random.Random(1), side=side)).text
        for side in (200, 384, 800)
    }
    assert answers == {scenes.describe(scene)}
