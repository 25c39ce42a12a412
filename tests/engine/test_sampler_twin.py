"""The sampler of a whole step chooses what the reference chooses, whatever is asked beside what."""

import dataclasses
import math
import warnings

import numpy
import pytest
import reference_sampler
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_sampler import ReferenceSampler
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt4_runtime import RequestError, SamplingParams
from minigpt4_runtime.engine.drawing import TORCH_CHOICE, exponentials
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.row_settings import lot_of
from minigpt4_runtime.engine.sampler import Sampler
from minigpt4_runtime.engine.scheduler import Token
from minigpt4_runtime.engine.sequence import Branch, Sequence
from minigpt4_runtime.kernels.contracts import Lots

BOS, EOS = 1, 2
SAMPLER = Sampler(bos_id=BOS, eos_id=EOS)
REFERENCE = ReferenceSampler(bos_id=BOS, eos_id=EOS)
SIZES = (3, 12, 200, 1000)  # From some size on, torch sorts and sums in other ways.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Form:
    """A guide that allows the same ids always, or fails."""

    def __init__(self, allowed):
        self._allowed = allowed

    def allowed(self):
        if self._allowed is None:
            raise RequestError("It went too far.")
        return self._allowed

    def feed(self, token_id):
        pass

    def fork(self):
        return self


def or_else(neutral, values):
    return st.one_of(st.just(neutral), values)


def params(size):
    """Any settings of an answer without beams."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from((0.0, 0.0, 1e-300, 0.3, 1.0, 1.7, 1e6)),
        top_k=or_else(0, st.integers(1, size + 5)),
        top_p=or_else(1.0, st.floats(1e-9, 1.0)),
        min_p=or_else(0.0, st.floats(0.0, 1.0)),
        repetition_penalty=or_else(1.0, st.floats(0.3, 3.0)),
        presence_penalty=or_else(0.0, st.floats(-2, 2)),
        frequency_penalty=or_else(0.0, st.floats(-2, 2)),
        logit_bias=or_else(
            (), st.dictionaries(st.integers(0, size - 1), st.floats(-100, 100), max_size=4)
        ),
        min_new_tokens=st.sampled_from((0, 0, 3)),
        logprobs=or_else(None, st.integers(0, 20)),
    )


def masks(size):
    """None (no guide), or what one allows: all, a part, the end alone; or its failure."""
    part = st.integers(0, 2**32 - 1).map(
        lambda seed: numpy.random.default_rng(seed).random(size) < 0.3
    )
    end_alone = numpy.arange(size) == EOS
    return st.one_of(
        st.none(), st.none(), part.filter(numpy.any), st.just(end_alone), st.just("failure")
    )


@st.composite
def sequences(draw, size, number):
    """A greedy one, one that wants anything, or a beam search, with something said."""
    answer = draw(st.lists(st.integers(0, size - 1), max_size=6))
    kind = draw(st.sampled_from(("plain", "any", "any", "any", "beams")))
    if kind == "beams":
        asked = SamplingParams(num_beams=2, repetition_penalty=draw(st.sampled_from((1.0, 1.4))))
    else:
        asked = draw(params(size)) if kind == "any" else SamplingParams()
    mask = draw(masks(size)) if kind == "any" else None
    guide = None if mask is None else Form(None if isinstance(mask, str) else mask)
    request = Request((BOS, 3), (), asked, guide=guide)
    seed = draw(st.integers(0, 2**63 - 1))
    sequence = Sequence(number, request, seed=seed, max_new_tokens=300)
    if kind == "beams":
        sequence.branches = [Branch([*answer, each], -0.5 * each) for each in range(2)]
    else:
        sequence.branches[0].answer += answer
    return sequence


@st.composite
def steps(draw):
    """(R, V) logits and the sequences that they are for."""
    size = draw(st.sampled_from(SIZES))
    asked = [draw(sequences(size, number)) for number in range(draw(st.integers(1, 8)))]
    num_rows = sum(len(each.branches) for each in asked)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = draw(st.sampled_from((0.5, 3.0, 30.0))) * torch.randn(
        num_rows, size, generator=generator
    )
    if draw(st.booleans()):
        logits = logits.round()  # Many are equal, as those of half precision are.
    for row in draw(st.lists(st.integers(0, num_rows - 1), max_size=2)):
        logits[row, draw(st.integers(0, size - 1))] = draw(
            st.sampled_from((math.nan, math.inf, -math.inf))
        )
    return logits, asked


def same(choice, expected, *, is_exact):
    """Errors by their words; ids exactly; logprobs as exactly as the device computes them."""
    if isinstance(expected, RequestError):
        return isinstance(choice, RequestError) and str(choice) == str(expected)
    if isinstance(expected, Token) and type(choice.token_id) is not int:
        return False  # What looks up a token takes no 3.0.
    if is_exact or not isinstance(expected, Token) or expected.logprobs is None:
        return choice == expected
    given_, wanted = choice.logprobs, expected.logprobs
    return (
        choice.token_id == expected.token_id == given_.token_id
        and given_.logprob == pytest.approx(wanted.logprob, abs=1e-5)
        and [value for _, value in given_.top]
        == pytest.approx([value for _, value in wanted.top], abs=1e-5)
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=75, deadline=None)
@given(step=steps())
def test_it_chooses_what_the_reference_chooses(step, device):
    logits, asked = step
    before = logits.clone()
    choices = SAMPLER.pick(logits.to(device), asked)
    expected = REFERENCE.pick(logits, asked)
    assert list(choices) == list(expected) == [each.id for each in asked]
    for number, choice in choices.items():
        assert same(choice, expected[number], is_exact=device == "cpu"), asked[number].request
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(step=steps())
def test_among_others_each_chooses_as_alone(step):
    logits, asked = step
    together, row = SAMPLER.pick(logits, asked), 0
    for each in asked:
        rows = logits[row : row + len(each.branches)]
        (alone,) = SAMPLER.pick(rows, [each]).values()
        assert same(alone, together[each.id], is_exact=True)
        row += len(each.branches)


def test_ids_are_drawn_as_often_as_they_are_likely():
    """Pearson's chi-squared of 4,000 draws, whose 0.1 % limit for 9 degrees of freedom is 27.9."""
    shares = torch.linspace(0.02, 0.18, 10, dtype=torch.float64)
    keys = tuple(lot_of(sequence_of(seed, {})) for seed in range(4000))
    asked = Lots((SamplingParams(temperature=1.0),) * len(keys), keys)
    drawn = TORCH_CHOICE.draw(shares.log().float().expand(len(keys), -1), asked)
    expected = len(keys) * shares
    assert ((drawn.bincount(minlength=10) - expected) ** 2 / expected).sum() < 27.9


def test_random_numbers_are_those_of_splitmix64():
    """Against a known sequence: of the seed 1234567, as in Rosetta Code's task of that name."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    wanted = [-math.log(((number >> 12) + 0.5) / 2**52) for number in known]
    for key in (1234567, 1234567 - 2**64):
        assert reference_sampler.exponentials(key, 4) == pytest.approx(wanted, rel=1e-15)
    found = exponentials(torch.tensor([1234567]), 4)
    assert found[0].tolist() == pytest.approx(wanted, rel=1e-15)


def sequence_of(seed, settings):
    return Sequence(0, Request((BOS,), (), SamplingParams(**settings)), seed=seed, max_new_tokens=9)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device, were there one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


EVERYTHING = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {3: 2}, "min_new_tokens": 9,
    "logprobs": 4,
}  # fmt: skip


def mixed_step(size=100):
    """A plain row, and rows that between them want everything."""
    guide = Form(numpy.arange(size) % 3 > 0)
    found = []
    for number, asked in enumerate(({}, EVERYTHING, {"temperature": 1.0}, {"logprobs": 0})):
        request = Request((BOS,), (), SamplingParams(**asked))
        request = dataclasses.replace(request, guide=guide if number == 1 else None)
        found.append(Sequence(number, request, seed=7, max_new_tokens=300))
        found[-1].branches[0].answer += [5, 6, 5]
    return torch.randn(len(found), size, generator=torch.Generator().manual_seed(1)), found


def test_one_copy_a_step_brings_all_results(monkeypatch):
    logits, asked = mixed_step()
    fetched = []
    fetch = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append(1) or fetch(tensor))
    with Waits() as waits:
        SAMPLER.pick(logits, asked)
    assert (len(fetched), waits.found) == (1, [])
    with waits:
        REFERENCE.pick(logits, asked)
    assert len(fetched) > 2
    assert waits.found, "what waits goes unseen"


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once_a_step():
    logits, asked = mixed_step()
    logits = logits.cuda()
    SAMPLER.pick(logits, asked)  # Whatever is set up at first use is set up now.
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            SAMPLER.pick(logits, asked)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "called a synch" in str(each.message)]
    assert len(waits) == 1


def test_a_device_without_float64_leaves_all_but_the_plain_to_the_cpu(monkeypatch):
    copied = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: copied.append(tensor.shape) or copy(tensor)
    )
    sampler = Sampler(bos_id=BOS, eos_id=EOS, has_float64=False)
    logits, asked = mixed_step()
    assert sampler.pick(logits, asked) == REFERENCE.pick(logits, asked)
    assert copied == [logits.shape]
    sampler.pick(logits[:1], asked[:1])
    assert copied == [logits.shape]
