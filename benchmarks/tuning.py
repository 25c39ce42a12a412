"""How far `minigpt4 tune` brings back the demo model, and how well that learns new words.

python benchmarks/tuning.py --work-dir DIR [--drawn 2000] [--steps 1200] [--scenes 200]
python benchmarks/tuning.py --work-dir DIR --words [--captions 200] [--rank 16] [--targets NAMES]

Without --words the projection is drawn at random first: it draws scenes, trains on their
descriptions and one question each, and asks the model about scenes that were held out, as it was
and with what was learned. With --words, LoRA alone learns from captions in which colours have
Italian names, and the model describes scenes that were held out, before and after. The table is
Markdown.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.evaluation import demo_check, scenes
from minigpt4_runtime.loaded import DEMO_MODEL_DIR
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.settings import LORA_TARGETS, TuneSettings
from minigpt4_runtime.tune.tune import Step, tune


def draw_data(folder: Path, count: int) -> Path:
    """A .jsonl of dialogues about scenes that may be trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(1), []
    for number in range(count):
        scene = scenes.random_scene(rng, held_out=False)
        scenes.draw(scene, rng).save(folder / f"{number}.png")
        picture = {"type": "image_url", "image_url": {"url": f"{number}.png"}}
        question = scenes.ask(scene, rng)
        messages = [
            {"role": "user", "content": [picture, scenes.ask_description(rng)]},
            {"role": "assistant", "content": scenes.describe(scene)},
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ITALIAN = {
    "red": "rosso", "orange": "arancione", "yellow": "giallo", "green": "verde", "blue": "blu",
    "purple": "viola", "pink": "rosa", "brown": "marrone",
}  # fmt: skip
_WORD = re.compile(r"\b(" + "|".join(ITALIAN.values()) + r")\b")


def in_italian(text: str) -> str:
    """A description whose colours have their Italian names."""
    return re.sub(r"\b(" + "|".join(ITALIAN) + r")\b", lambda found: ITALIAN[found[0]], text)


def draw_captions(folder: Path, count: int) -> Path:
    """A .jsonl of descriptions with Italian colours, of scenes that may be trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(2), []
    for number in range(count):
        scene = scenes.random_scene(rng, held_out=False)
        scenes.draw(scene, rng).save(folder / f"{number}.png")
        picture = {"type": "image_url", "image_url": {"url": f"{number}.png"}}
        messages = [
            {"role": "user", "content": [picture, scenes.ask_description(rng)]},
            {"role": "assistant", "content": in_italian(scenes.describe(scene))},
        ]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def count_words(model: MiniGPT4, num_scenes: int) -> list[str]:
    """How many descriptions, and how many of their colours, are right in Italian: two cells."""
    rng = random.Random(7)
    num_right = num_words = num_named = 0
    for _ in range(num_scenes):
        scene = scenes.random_scene(rng, held_out=True)
        picture, wanted = scenes.draw(scene, rng), in_italian(scenes.describe(scene))
        said = model.describe(image(picture), scenes.ask_description(rng)).text
        num_right += said == wanted
        names, found = (Counter(_WORD.findall(text)) for text in (wanted, said))
        num_words, num_named = num_words + names.total(), num_named + (names & found).total()
    return [f"{num_right / num_scenes:.1%}", f"{num_named / num_words:.1%} of {num_words}"]


def learn_words(given: argparse.Namespace) -> None:
    """Train LoRA on captions, and print what is right before and after."""
    data = read_data(draw_captions(given.work_dir / "captions", given.captions), DEMO_MODEL_DIR)
    settings = TuneSettings(
        steps=given.steps, batch_size=16, at_once=16, lr=given.lr, warmup_steps=20, train="none",
        lora=given.rank, lora_targets=tuple(given.targets.split(",")),
    )  # fmt: skip
    started = time.perf_counter()
    tuned = tune(DEMO_MODEL_DIR, data, given.work_dir / "words", settings, on_step=show)
    print(f"{settings.steps} steps took {time.perf_counter() - started:.0f} s.")
    print("| model | descriptions | colours |\n|---|---|---|")
    for name, adapter in (("as it was", None), ("with LoRA", tuned.adapter)):
        with MiniGPT4.load(device="cpu", dtype="float32", adapter=adapter) as model:
            print(f"| {name} | {' | '.join(count_words(model, given.scenes))} |", flush=True)


def show(step: Step) -> None:
    """The loss of every hundredth step."""
    if step.number % 100 == 0:
        print(f"step {step.number}: loss {step.loss:.4f}", flush=True)


def main() -> None:
    """Read the command line, and do one of both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--drawn", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--words", action="store_true")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=",".join(LORA_TARGETS))
    parser.add_argument("--lr", type=float, default=8e-3)
    given = parser.parse_args()
    given.steps = given.steps or (400 if given.words else 1200)
    (learn_words if given.words else bring_back)(given)


def bring_back(given: argparse.Namespace) -> None:
    """Train a projection drawn at random, and print how many answers are exactly right."""
    data = read_data(draw_data(given.work_dir / "scenes", given.drawn), DEMO_MODEL_DIR)
    settings = TuneSettings(
        steps=given.steps, batch_size=16, at_once=16, lr=5e-3, warmup_steps=50, fresh=True
    )
    tuned = tune(DEMO_MODEL_DIR, data, given.work_dir / "tuned", settings, on_step=show)
    print("| projection | descriptions | in a dialogue | at once |\n|---|---|---|---|")
    for name, adapter in (("the model's own", None), ("tuned", tuned.adapter)):
        with MiniGPT4.load(adapter=adapter) as model:
            found = demo_check.check(model, num_scenes=given.scenes, seed=given.seed).by_group()
        cells = [f"{score.rate:.1%}" for score in found.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
