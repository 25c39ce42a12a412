"""How far `minigpt4 tune` brings back the demo model, whose projection is drawn at random first.

python benchmarks/tuning.py --work-dir DIR [--drawn 2000] [--steps 1200] [--scenes 200]

It draws scenes, trains on their descriptions and one question each, and asks the model about scenes
that were held out: as it was, and with what was learned. The table is Markdown.
"""

import argparse
import json
import random
from pathlib import Path

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.evaluation import demo_check, scenes
from minigpt4_runtime.loaded import DEMO_MODEL_DIR
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.settings import TuneSettings
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


def show(step: Step) -> None:
    """The loss of every hundredth step."""
    if step.number % 100 == 0:
        print(f"step {step.number}: loss {step.loss:.4f}", flush=True)


def main() -> None:
    """Train, and print how many answers are exactly right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--drawn", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
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
