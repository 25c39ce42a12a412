"""What many pictures cost in the engine and, one after the other, in the laboratory.

python benchmarks/study_batch.py
python benchmarks/study_batch.py --model wide --pictures 16 --rounds 3

Two works: answers under a contrast with the same question without a picture, and the scores of four
given answers. Each round draws new pictures, does both works on both sides in turns with empty
caches, and compares the results. The table shows the median ratio of times, the laboratory's to the
engine's, with the smallest and the largest, and how many results were the same. demo is the bundled
model, wide has random weights, eight layers of 1,024.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4_runtime import Message, MiniGPT4, NextLogits, SamplingParams, image
from minigpt4_runtime.evaluation.scenes import draw, random_scene
from minigpt4_runtime.lab import Lab, Seen

QUESTION = "Describe this image in detail."
CANDIDATES = ("There is one shape.", "There are two shapes.", "Three", "It is a photo of a dog.")
BLIND = [Message("user", (QUESTION,))]


def contrast(seen: Seen | NextLogits) -> Tensor:
    """As in VCD, with a question without a picture in the noisy one's place."""
    is_unlikely = seen.logits < seen.logits.amax(-1, keepdim=True) + math.log(0.1)
    return (2 * seen.logits - seen.branches["blind"]).masked_fill(is_unlikely, -math.inf)


def question(picture: Image.Image) -> list[Message]:
    """What is asked about a picture."""
    return [Message("user", (image(picture), QUESTION))]


def steer_in_engine(model: MiniGPT4, pictures: list[Image.Image], num_new: int) -> list[Any]:
    """The ids of each answer."""
    sampling = SamplingParams(max_new_tokens=num_new)
    done = model.describe_all(
        pictures, QUESTION, sampling, processors=[contrast], branches=lambda _: {"blind": BLIND}
    )
    found = {each.index: each.reply.token_ids for each in done if each.reply}
    return [found[number] for number in range(len(pictures))]


def steer_in_lab(lab: Lab, pictures: list[Image.Image], num_new: int) -> list[Any]:
    """The same, one picture at a time."""
    found = []
    for picture in pictures:
        (answer,) = lab.generate(
            lab.prompt(question(picture)), [contrast], branches={"blind": lab.prompt(BLIND)},
            max_new_tokens=num_new,
        )  # fmt: skip
        found.append(answer.token_ids)
    return found


def score_in_engine(model: MiniGPT4, pictures: list[Image.Image], _: int) -> list[Any]:
    """The candidate that is the likeliest, for each picture."""
    tickets = [model.submit_score(question(each), CANDIDATES) for each in pictures]
    return [likeliest(scores) for (scores,) in tickets]


def score_in_lab(lab: Lab, pictures: list[Image.Image], _: int) -> list[Any]:
    """The same, one picture at a time."""
    scores = (lab.score(lab.prompt(question(each)), CANDIDATES).tolist() for each in pictures)
    return [likeliest(each) for each in scores]


def likeliest(scores: Any) -> int:
    """The place of the largest."""
    return max(range(len(scores)), key=scores.__getitem__)


def timed(work: Callable[..., list[Any]], *given: Any) -> tuple[float, list[Any]]:
    """The seconds that a work takes, and what it gives."""
    started = time.perf_counter()
    found = work(*given)
    return time.perf_counter() - started, found


def open_model(name: str) -> MiniGPT4:
    """The demo model, or a wider one of its kind."""
    demo = MiniGPT4.load(device="cpu")
    if name == "demo":
        return demo
    language = dataclasses.replace(
        demo.config.language, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    config = dataclasses.replace(demo.config, language=language)
    return MiniGPT4.with_random_weights(config, device="cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("demo", "wide"), default="demo")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--new", type=int, default=40, help="the most ids of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, rng = open_model(options.model), random.Random(0)
    lab = model.lab()
    works = {"contrast": (steer_in_engine, steer_in_lab), "score": (score_in_engine, score_in_lab)}
    ratios: dict[str, list[float]] = {name: [] for name in works}
    same = dict.fromkeys(works, 0)
    for _ in range(options.rounds):
        scenes = [random_scene(rng, held_out=False) for _ in range(options.pictures)]
        pictures = [draw(scene, rng) for scene in scenes]
        for name, (in_engine, in_lab) in works.items():
            model.probe.use_engine(model.engine_config)
            ours, found = timed(in_engine, model, pictures, options.new)
            labs, expected = timed(in_lab, lab, pictures, options.new)
            ratios[name].append(labs / ours)
            same[name] += sum(map(tuple.__eq__, enumerate(found), enumerate(expected)))
    for name, found in ratios.items():
        count = options.pictures * options.rounds
        print(
            f"{options.model}, {name}: {statistics.median(found):.1f} ({min(found):.1f} to "
            f"{max(found):.1f}) times as fast, {same[name]} of {count} the same"
        )


if __name__ == "__main__":
    main()
