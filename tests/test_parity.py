"""The original's numbers and answers, on every golden checkpoint.

tests/goldens/README.md says how they were made: by the original code, in float32, from checkpoints
in the published layout. They are converted here as a user would convert them.
"""

import json

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, NAMES, SEARCHES, Golden, assert_same_ids, run_together

from minigpt4_runtime import EngineConfig, Message, MiniGPT4, RequestError, SamplingParams
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.engine.plan import Slice, StepPlan
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.kernels.registry import attention_kernel
from minigpt4_runtime.text.prompt import render
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.vision.torch import TorchVisionEncoder

RELATIVE = 1e-4  # Of the largest magnitude in the original's array.


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
        pixels = load_image(golden.picture(name), golden.model.config.vision).values
        assert np.abs(pixels - golden.arrays[f"{name}/pixels"]).max() <= 1e-6


def test_every_stage_of_the_image_side(golden):
    whole = load_model(golden.model.model_dir, device=torch.device("cpu"), dtype=torch.float32)
    for name in golden.pictures:
        pixels = torch.from_numpy(golden.arrays[f"{name}/pixels"])[None]
        tower = whole.vision.vit(pixels)
        assert largest_share(tower[0], golden.arrays[f"{name}/vit"]) <= RELATIVE
        normed = whole.vision.ln_vision(tower)
        assert largest_share(normed[0], golden.arrays[f"{name}/ln_vision"]) <= RELATIVE
        rows = golden.model.embed_images([golden.picture(name)])
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
    model = load_model(golden.model.model_dir, device=torch.device("cpu"), dtype=torch.float32)
    runner = Runner(
        model.language,
        TorchVisionEncoder(model.vision),
        attention_kernel("reference"),
        config=EngineConfig(max_step_tokens=2048),
        num_blocks=128,
    )
    for case in golden.cases("single", "multi", "events"):
        prefix = f"case{case['id']}"
        if f"{prefix}/first_logits" not in golden.arrays:
            continue
        request = request_of(golden.model, golden.play(case)[0])
        plan, pixels = whole_plan(request), {each.digest: each.pixels for each in request.images}
        ids = torch.tensor(request.token_ids)
        embeddings = runner._embed(plan, ids, pixels)
        if f"{prefix}/inputs_embeds" in golden.arrays:
            theirs = golden.arrays[f"{prefix}/inputs_embeds"]
            assert largest_share(embeddings, theirs) <= RELATIVE
        (logits,) = runner.execute(plan, pixels)
        assert largest_share(logits, golden.arrays[f"{prefix}/first_logits"]) <= RELATIVE


def request_of(model: MiniGPT4, asked: list[Message]) -> Request:
    """What the engine is given for a dialogue."""
    encoded = model.encode_prompt(asked)
    images = model._loaded.open_images(render(asked, model._template), encoded)
    return Request(encoded.token_ids, images, SamplingParams())


def whole_plan(request: Request) -> StepPlan:
    """All of a prompt in one step."""
    sequence = Sequence(0, request, seed=0, max_new_tokens=1)
    ids = request.token_ids
    images, blocks = (
        sequence.images(sequence.branches[0], 0, len(ids)),
        tuple(range(-(-len(ids) // 16))),
    )
    return StepPlan((Slice(0, 0, 0, ids, 0, 0, blocks, images, num_sampled=1),))


@pytest.mark.parametrize("golden", ["minigptv2"], indirect=True)
def test_the_adapters_count(golden):
    """The bare language model would say something else."""
    for case in golden.cases("single"):
        reply = golden.play(case)[1][-1]
        assert list(reply.token_ids) != case["output_ids"]["greedy_without_lora"][1:]


@pytest.mark.parametrize("golden", ["minigptv2"], indirect=True)
def test_dialogues_as_the_originals_page_keeps_them(golden):
    """Its history has `</s>` in place of each reply: a turn without content."""
    for case in golden.content["demo"]:
        asked, sampling = [], golden.sampling(stop=())
        pictures = list(map(golden.picture, case["images"]))
        for text, prompt, theirs in zip(
            case["turns"], case["prompts"], case["replies"], strict=True
        ):
            untold = [Message("assistant", ())] if asked else []
            asked = [*asked, *untold, Message("user", (*pictures, text))]
            pictures = []
            assert golden.model.encode_prompt(asked).text == prompt
            reply = golden.model.chat(asked, sampling)
            assert golden.model._tokenizer.decode(reply.token_ids) == theirs
        pieces = [list(piece) for piece in golden.model.encode_prompt(asked).pieces]
        assert pieces == case["segment_ids"]
        assert_same_ids(golden, reply.token_ids, case["output_ids"]["greedy"])


@pytest.mark.parametrize("golden", ["minigptv2"], indirect=True)
def test_a_batch_of_the_originals_evaluation(golden):
    batch = golden.content["eval"]
    sampling = SamplingParams(max_new_tokens=batch["max_new_tokens"])
    asked = [
        [Message("user", (golden.picture(name), text))]
        for name, text in zip(batch["images"], batch["turns"], strict=True)
    ]
    for messages, prompt, pieces in zip(asked, batch["prompts"], batch["segment_ids"], strict=True):
        encoded = golden.model.encode_prompt(messages)
        assert encoded.text == prompt
        assert [list(piece) for piece in encoded.pieces] == pieces
    tickets = [golden.model.submit(messages, sampling) for messages in asked]
    assert [list(ticket)[-1].reply.text for ticket in tickets] == batch["replies"]
    alone = [golden.model.chat(messages, sampling).text for messages in asked]
    assert alone == batch["replies_one_by_one"]


@pytest.mark.parametrize("golden", ["minigptv2"], indirect=True)
def test_a_task_is_what_the_original_was_told_in_words(golden):
    by_text = {case["turns"][0]: case for case in golden.cases("single")}
    case = by_text["[vqa] What is in the picture?"]
    picture, sampling = golden.picture(case["images"][0]), golden.sampling()
    reply = golden.model.describe(picture, "What is in the picture?", sampling, task="vqa")
    assert_same_ids(golden, reply.token_ids, case["output_ids"]["greedy"])
    (described,) = golden.model.describe_all(
        [picture], "What is in the picture?", sampling, task="vqa"
    )
    assert described.reply == reply
    with pytest.raises(RequestError, match="task is 'count'"):
        golden.model.describe(picture, task="count")


@pytest.mark.parametrize("golden", ["vicuna", "llama2", "minigptv2"], indirect=True)
def test_prompts_ids_and_replies_through_a_compiled_graph(golden, graph_dir):
    model_dir = golden.model.model_dir
    model = MiniGPT4.load(
        model_dir, device="cpu", dtype="float32", vision_runtime="onnx",
        vision_graph=graph_dir(model_dir),
    )  # fmt: skip
    assert model.vision_runtime == "onnx"
    compiled = Golden(golden.folder, model)
    rows = model.embed_images([golden.picture(name) for name in golden.pictures])
    for row, name in zip(rows, golden.pictures, strict=True):
        assert largest_share(row, golden.arrays[f"{name}/embeddings"]) <= RELATIVE
    for case in compiled.cases("single", "multi", "events"):
        replies = compiled.play(case)[1]
        assert_same_ids(compiled, replies[-1].token_ids, case["output_ids"]["greedy"])


@pytest.mark.parametrize("search", [name for name in SEARCHES if name != "greedy"])
def test_other_searches_alone(golden, search):
    cases = [case for case in golden.cases("single") if search in case["output_ids"]]
    assert cases
    for case in cases[:3]:  # Below all of them are asked, at once.
        reply = golden.model.chat(golden.question(case), golden.sampling(**SEARCHES[search]))
        assert_same_ids(golden, reply.token_ids, case["output_ids"][search])


def test_all_searches_of_all_cases_at_once(golden):
    run_together(golden)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/tokenizer.json")), ids=str)
def test_tokenizers_agree(path):
    tokenizer = Tokenizer(path.parent / "checkpoint/llama/tokenizer.model")
    for entry in json.loads(path.read_text(encoding="utf-8")):
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]
    for entry in json.loads(path.with_name("decode.json").read_text(encoding="utf-8")):
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]
