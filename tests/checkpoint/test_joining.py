"""Weights that lie in one: the same numbers, the same products, and none of them twice."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4_runtime import MiniGPT4, SamplingParams, image
from minigpt4_runtime.checkpoint.blank_model import blank_for
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_language
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.formats.contracts import InOrder
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.linear import Joint
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"
DEMO = load_config(DEMO_DIR)
CPU = torch.device("cpu")
FORMATS = [
    "float", "w8a16", "w8a8-g32-asymmetric", "w4a16-g32-asymmetric", "w8a16-sparse24", "w8a8-fp8",
]  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def random_language(formats, **where) -> Llama:
    where = {"device": CPU, "dtype": torch.float32, **where}
    return fill_at_random(blank_for(where, DEMO, {"language.layers": formats}).language, **where)


def joints(module):
    return [each for each in module.modules() if isinstance(each, Joint)]


def compute(language, ids=(5, 17, 3)):
    rows = language.embed(torch.tensor(ids))
    return language(rows, torch.arange(len(ids)), causal_attention())


def assert_joined(language):
    """A part of a later weight lies where that of the one before it ends."""
    assert joints(language)
    for joint in joints(language):
        for name in joint.linears[0].part_names:
            parts = [linear.get_parameter(name) for linear in joint.linears]
            for first, second in pairwise(parts):
                assert first.data_ptr() + first.nbytes == second.data_ptr()


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_are_the_same_and_so_is_what_they_compute(name):
    apart, joined = random_language(name), random_language(name, joins=True)
    for key, weight in apart.state_dict().items():
        assert torch.equal(weight, joined.state_dict()[key]), key
    assert_joined(joined)
    assert torch.allclose(compute(apart), compute(joined), rtol=1e-4, atol=1e-5)


class Second(Solo):
    """The second of two ranks, which sums nothing."""

    rank, size = 1, 2


@pytest.mark.parametrize(
    ("plan", "group"),
    [
        (None, Solo()), (None, Second()),
        (QuantisePlan(weights="w4a16", group_size=32, is_symmetric=False), Solo()),
        (QuantisePlan(weights="w8a8"), Second()),
    ],
)  # fmt: skip
def test_a_folder_is_read_into_its_place(tmp_path, plan, group):
    folder = DEMO_DIR if plan is None else tmp_path / "packed"
    if plan is not None:
        quantise(DEMO_DIR, folder, plan)
    apart, joined = (
        load_language(folder, device=CPU, dtype=torch.float32, group=group, joins=joins)
        for joins in (False, True)
    )
    assert_joined(joined)
    for key, weight in apart.state_dict().items():
        assert torch.equal(weight, joined.state_dict()[key]), key
    assert torch.allclose(compute(apart), compute(joined), rtol=1e-4, atol=1e-5)


def test_what_a_kernel_puts_in_order_stays_apart():
    def arrange(parts):
        return {"turned": parts["weight"].T.contiguous()}, lambda rows, own, _: rows @ own["turned"]

    language = random_language("float", joins=True, kernel_of=lambda _: InOrder(arrange))
    assert torch.allclose(compute(language), compute(random_language("float")), atol=1e-5)


def test_answers_are_the_same_alone_and_together(monkeypatch):
    questions = ("What is this?", "Describe this image in detail.", "Which colours are there?")
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True, stop=())
    with MiniGPT4.load("demo", device="cpu") as model:
        wanted = [model.describe(PICTURE, each, sampling=sampling).text for each in questions]
    monkeypatch.setattr(CpuBackend, "facts", replace(CpuBackend.facts, joins=True))
    with MiniGPT4.load("demo", device="cpu") as model:
        assert_joined(model._loaded.rank_model.language)
        messages = [[{"role": "user", "content": [image(PICTURE), each]}] for each in questions]
        tickets = [model.submit(each, sampling) for each in messages]
        assert [list(ticket)[-1].reply.text for ticket in tickets] == wanted
        assert model.describe(PICTURE, questions[0], sampling=sampling).text == wanted[0]
