"""A few drawn scenes as training data."""

import json
import random

from minigpt4_runtime.evaluation import scenes


def write_dialogues(folder):
    """A .jsonl of eight scenes; every second one is asked about after its description."""
    rng, lines = random.Random(5), []
    for number in range(8):
        scene = scenes.random_scene(rng, held_out=False)
        scenes.draw(scene, rng).save(folder / f"{number}.png")
        picture = {"type": "image_url", "image_url": {"url": f"{number}.png"}}
        said = [
            {"role": "user", "content": [picture, scenes.ask_description(rng)]},
            {"role": "assistant", "content": scenes.describe(scene)},
        ]
        if number % 2:
            question = scenes.ask(scene, rng)
            said += [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answer},
            ]
        lines.append(json.dumps({"messages": said}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
