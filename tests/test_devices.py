"""What a device must give to count as supported: the originals' tokens, the same rows and choices.

On a GPU and an NPU these are the first tests to look at. They run on the CPU too.
"""

import pytest
import torch
from golden_cases import GOLDENS, NAMES, Golden, run_together

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine.engine import is_out_of_memory
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.sampler import Sampler
from minigpt4_runtime.engine.sequence import Branch, Sequence

# The largest difference of a picture's rows from those in float32, as a share of the largest value.
RELATIVE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
BOS, EOS, VOCABULARY = 1, 2, 200


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("npu", marks=pytest.mark.npu),
    ]
)
def device(request) -> str:
    return request.param


def load(golden_model_dir, name, device, **engine) -> Golden:
    model = MiniGPT4.load(golden_model_dir(name), device=device, dtype="float32", engine=engine)
    return Golden(GOLDENS / name, model)


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_tokens_from_every_search_at_once(golden_model_dir, name, device):
    run_together(load(golden_model_dir, name, device), most=8)


def test_the_same_tokens_in_chunks_and_after_preemption(golden_model_dir, device):
    golden = load(
        golden_model_dir, "vicuna", device, max_step_tokens=48, max_running=24, num_blocks=22
    )
    run_together(golden, most=4)
    assert golden.model.stats().num_preempted > 0


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_rows_of_pictures(golden_model_dir, name, dtype, device):
    reference = load(golden_model_dir, name, "cpu")
    pictures = [reference.folder / "images" / picture for picture in reference.pictures]
    model = MiniGPT4.load(golden_model_dir(name), device=device, dtype=dtype)
    expected = reference.model.embed_images(pictures)
    difference = (model.embed_images(pictures) - expected).abs().max() / expected.abs().max()
    assert difference <= RELATIVE[dtype]


def test_every_weight_arrives(golden_model_dir, device):
    model_dir, place = golden_model_dir("vicuna"), open_device(device).device
    here = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float16).state_dict()
    there = load_model(model_dir, device=place, dtype=torch.float16).state_dict()
    assert {weight.device.type for weight in there.values()} == {place.type}
    assert all(torch.equal(there[name].cpu(), weight) for name, weight in here.items())


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"num_beams": 3},
    ],
    ids=str,
)
def test_choices_from_the_same_logits(sampling, device):
    request = Request((BOS, 3), (), SamplingParams(**sampling))
    sequence = Sequence(0, request, seed=7, max_new_tokens=300)
    sequence.branches = [Branch([5, 6 + i], -0.5 * i) for i in range(request.sampling.num_beams)]
    logits = 3 * torch.randn(
        len(sequence.branches), VOCABULARY, generator=torch.Generator().manual_seed(1)
    )
    sampler = Sampler(bos_id=BOS, eos_id=EOS)
    there = sampler.pick(logits.to(open_device(device).device), [sequence])[0]
    here = sampler.pick(logits, [sequence])[0]
    if sampling.get("logprobs"):
        found, expected = there.logprobs, here.logprobs
        assert [each for each, _ in found.top] == [each for each, _ in expected.top]
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        there, here = there.token_id, here.token_id
    assert there == here


def test_memory_that_is_not_there_is_known_as_such(device):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8, device=open_device(device).device)
    assert is_out_of_memory(caught.value)
