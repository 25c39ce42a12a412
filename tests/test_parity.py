"""The original's numbers and answers, on every golden checkpoint.

tests/goldens/README.md says how they were made: by the original code, in float32, from checkpoints
in the published layout. They are converted here as a user would convert them.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4_runtime import Message, MiniGPT4, SamplingParams, image
from minigpt4_runtime.api import Messages
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.pixels import load as load_image

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/cases.json"))
RELATIVE = 1e-4  # Of the largest magnitude in the original's array.


@dataclass(frozen=True)
class Golden:
    """One checkpoint, what the original computed from it, and our model of it."""

    folder: Path
    model: MiniGPT4

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "arrays.npz"))

    @cached_property
    def content(self) -> dict:
        return json.loads((self.folder / "cases.json").read_text(encoding="utf-8"))

    @property
    def pictures(self) -> list[str]:
        return sorted({key.split("/")[0] for key in self.arrays if key.endswith("/pixels")})

    def messages(self, case: dict) -> Messages:
        """A single-turn case as a user of the API would write it."""
        pictures = [image(self.folder / "images" / name) for name in case["images"]]
        return [Message("user", (*pictures, case["turns"][0]))]

    def sampling(self, **changes) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.content["max_new_tokens"], **changes)


@pytest.fixture(scope="module", params=NAMES)
def golden(request, golden_model_dir) -> Golden:
    model = MiniGPT4.load(golden_model_dir(request.param), device="cpu", dtype="float32")
    return Golden(GOLDENS / request.param, model)


def largest_share(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the original's largest magnitude."""
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


def test_pixels(golden):
    for name in golden.pictures:
        path = golden.folder / "images" / name
        pixels = load_image(image(path), golden.model.config.vision).values
        assert np.abs(pixels - golden.arrays[f"{name}/pixels"]).max() <= 1e-6


def test_every_stage_of_the_image_side(golden):
    whole = load_model(golden.model.model_dir, device=torch.device("cpu"), dtype=torch.float32)
    for name in golden.pictures:
        pixels = torch.from_numpy(golden.arrays[f"{name}/pixels"])[None]
        tower = whole.vision.vit(pixels)
        assert largest_share(tower[0], golden.arrays[f"{name}/vit"]) <= RELATIVE
        normed = whole.vision.ln_vision(tower)
        assert largest_share(normed[0], golden.arrays[f"{name}/ln_vision"]) <= RELATIVE
        rows = golden.model.embed_images([golden.folder / "images" / name])
        assert largest_share(rows[0], golden.arrays[f"{name}/embeddings"]) <= RELATIVE


def single_cases(golden):
    return [case for case in golden.content["cases"] if case["kind"] == "single"]


def test_prompts_and_ids_of_every_piece(golden):
    for case in single_cases(golden):
        encoded = golden.model.encode_prompt(golden.messages(case))
        assert encoded.text == case["prompt"]
        assert [list(piece) for piece in encoded.pieces] == case["segment_ids"]


def test_embeddings_and_first_logits(golden):
    runner = golden.model._engine._runner
    for case in single_cases(golden):
        request = golden.model._request(golden.messages(case), SamplingParams())
        embeddings = runner.embed(request)
        theirs = golden.arrays[f"case{case['id']}/inputs_embeds"]
        assert largest_share(embeddings, theirs) <= RELATIVE
        logits = runner.forward(embeddings, runner.new_cache(len(embeddings)))
        assert largest_share(logits, golden.arrays[f"case{case['id']}/first_logits"]) <= RELATIVE


SEARCHES = {
    "greedy": {},
    "greedy_rep1.05": {"repetition_penalty": 1.05},
    "greedy_nostop": {"stop": ()},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_output_ids(golden, search):
    for case in single_cases(golden):
        reply = golden.model.chat(golden.messages(case), golden.sampling(**SEARCHES[search]))
        bos, *theirs = case["output_ids"][search]
        assert bos == golden.model._tokenizer.bos_id
        assert list(reply.token_ids) == theirs
        if search == "greedy":
            assert reply.text == case["reply"]


def test_dialogues(golden):
    for case in golden.content["cases"]:
        if case["kind"] != "multi":
            continue
        messages: list[Message] = []
        pictures = [image(golden.folder / "images" / name) for name in case["images"]]
        for turn, reply_text in zip(case["turns"], case["replies"], strict=True):
            messages.append(Message("user", (*pictures, turn)))
            pictures = []
            reply = golden.model.chat(messages, golden.sampling())
            assert reply.text == reply_text
            last, messages = messages, [*messages, Message("assistant", (reply.text,))]
        encoded = golden.model.encode_prompt(last)
        assert encoded.text == case["prompt"]
        assert [list(piece) for piece in encoded.pieces] == case["segment_ids"]
        assert list(reply.token_ids) == case["output_ids"]["greedy"][1:]
