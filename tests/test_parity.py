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

from minigpt4_runtime import Message, MiniGPT4, Reply, SamplingParams, image
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.pixels import load as load_image
from minigpt4_runtime.tokenizer import Tokenizer

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

    def sampling(self, **changes) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.content["max_new_tokens"], **changes)

    def cases(self, *kinds: str) -> list[dict]:
        """The cases of these kinds, without what differs on purpose."""
        cases = [case for case in self.content["cases"] if case["kind"] in kinds]
        return [case for case in cases if not any(map(ends_in_mark, case["turns"]))]

    def play(self, case: dict) -> tuple[list[Message], list[Reply]]:
        """Go through a case as a user of the API would: the last question, and all replies."""
        messages: list[Message] = []
        parts: list = []
        replies: list[Reply] = []
        for what, *value in events_of(case):
            if what == "image":
                parts.append(image(self.folder / "images" / value[0]))
            elif what == "ask":
                parts.append(value[0])
            else:
                asked = messages = [*messages, Message("user", tuple(parts))]
                parts = []
                if what == "answer":
                    replies.append(self.model.chat(asked, self.sampling()))
                    value = [replies[-1].text]
                messages = [*messages, Message("assistant", (value[0],))]
        return asked, replies


def ends_in_mark(text: str) -> bool:
    """The original takes a text of a user that ends so for a picture; we do not."""
    return text.endswith("</Img>")


def events_of(case: dict) -> list[list[str]]:
    """What happens in a case, in order: image, ask, answer, or a reply that is given."""
    if "events" in case:
        return case["events"]
    turns = [event for text in case["turns"] for event in (["ask", text], ["answer"])]
    return [["image", name] for name in case["images"]] + turns


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


def test_prompts_ids_and_replies(golden):
    for case in golden.cases("single", "multi", "events"):
        asked, replies = golden.play(case)
        encoded = golden.model.encode_prompt(asked)
        assert encoded.text == case["prompt"]
        assert [list(piece) for piece in encoded.pieces] == case["segment_ids"]
        assert_same_ids(golden, replies[-1].token_ids, case["output_ids"]["greedy"])
        texts = [reply.text for reply in replies]
        assert texts == (case["replies"] if "replies" in case else [case["reply"]])


def test_embeddings_and_first_logits(golden):
    runner = golden.model._engine._runner
    for case in golden.cases("single", "multi", "events"):
        prefix = f"case{case['id']}"
        if f"{prefix}/first_logits" not in golden.arrays:
            continue
        request = golden.model._request(golden.play(case)[0], SamplingParams())
        embeddings = runner.embed(request)
        if f"{prefix}/inputs_embeds" in golden.arrays:
            theirs = golden.arrays[f"{prefix}/inputs_embeds"]
            assert largest_share(embeddings, theirs) <= RELATIVE
        logits = runner.forward(embeddings, runner.new_cache(len(embeddings)))
        assert largest_share(logits, golden.arrays[f"{prefix}/first_logits"]) <= RELATIVE


SEARCHES = {"greedy_rep1.05": {"repetition_penalty": 1.05}, "greedy_nostop": {"stop": ()}}


@pytest.mark.parametrize("search", SEARCHES)
def test_other_searches(golden, search):
    for case in golden.cases("single"):
        asked, _ = golden.play(case)
        reply = golden.model.chat(asked, golden.sampling(**SEARCHES[search]))
        assert_same_ids(golden, reply.token_ids, case["output_ids"][search])


def assert_same_ids(golden: Golden, ours: tuple[int, ...], theirs: list[int]) -> None:
    """Equal, or cut at a "###" that the original cuts only from the text and goes on after."""
    tokenizer = golden.model._tokenizer
    assert theirs[0] == tokenizer.bos_id
    assert list(ours) == theirs[1 : len(ours) + 1]
    if len(ours) < len(theirs) - 1:
        assert "###" in tokenizer.decode(ours)
        assert not any(list(ours[-len(stop) :]) == stop for stop in golden.content["stop_ids"])


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/tokenizer.json")), ids=str)
def test_tokenizers_agree(path):
    tokenizer = Tokenizer(path.parent / "checkpoint/llama/tokenizer.model")
    for entry in json.loads(path.read_text(encoding="utf-8")):
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]
    for entry in json.loads(path.with_name("decode.json").read_text(encoding="utf-8")):
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]
