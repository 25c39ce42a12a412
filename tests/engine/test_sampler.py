"""The next id is chosen as transformers 4.30 chooses it, and repeatably."""

import pytest
import torch

from minigpt4_runtime import RequestError, SamplingParams
from minigpt4_runtime.engine.sampler import Sampler

BOS, EOS = 1, 2


def sampler(**values) -> Sampler:
    return Sampler(SamplingParams(**values), bos_id=BOS, eos_id=EOS)


def test_greedy_takes_the_largest():
    assert sampler().pick(torch.tensor([0.0, 1.0, 5.0, 4.0])) == 2


def test_repetition_penalty_counts_bos_and_what_was_chosen():
    chooser = sampler(repetition_penalty=2.0)
    logits = torch.tensor([1.0, 3.0, -4.0, 2.0])
    assert chooser.pick(logits) == 3  # BOS is seen from the start: 3.0 counts as 1.5.
    assert chooser.pick(logits) == 1  # 3 is seen now as well: 2.0 counts as 1.0.
    assert torch.equal(logits, torch.tensor([1.0, 3.0, -4.0, 2.0]))


def test_repetition_penalty_pushes_negative_values_down():
    chooser = sampler(repetition_penalty=3.0)
    assert chooser.pick(torch.tensor([-2.5, -1.0, -2.8])) == 0


def test_end_is_forbidden_until_the_minimum():
    chooser = sampler(min_new_tokens=2)
    logits = torch.tensor([0.0, 1.0, 9.0, 2.0])
    assert [chooser.pick(logits) for _ in range(3)] == [3, 3, EOS]


def test_the_same_seed_gives_the_same_answer():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    first, second, other = (
        [chooser.pick(row) for row in logits]
        for chooser in (sampler(temperature=1, seed=5), sampler(temperature=1, seed=5),
                        sampler(temperature=1, seed=6))
    )  # fmt: skip
    assert first == second != other
    unseeded = [[sampler(temperature=1).pick(row) for row in logits] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def draws(logits, **values) -> set[int]:
    return {sampler(temperature=1.0, seed=s, **values).pick(logits) for s in range(300)}


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([1.0, 1.2, 1.1, 0.9, 1.3])
    assert draws(logits, top_k=2) == {1, 4}
    assert draws(logits, top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draws(logits, top_p=0.79) == {0, 1}
    assert draws(logits, top_p=0.01) == {0}
    assert draws(logits, top_p=1.0) == {0, 1, 2, 3}


def test_draws_follow_the_distribution():
    chooser = sampler(temperature=1.0, seed=1)
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    picks = torch.tensor([chooser.pick(logits) for _ in range(4000)])
    shares = torch.bincount(picks, minlength=3) / len(picks)
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_no_temperature_is_too_low(temperature):
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=2)
    assert Sampler(params, bos_id=BOS, eos_id=EOS).pick(torch.tensor([1.0, 2.0, 1.5])) == 1


def test_low_temperature_sharpens():
    logits = torch.tensor([1.0, 2.0, 1.5])
    assert {sampler(temperature=0.01, seed=s).pick(logits) for s in range(50)} == {1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_said(bad):
    with pytest.raises(RequestError, match="overflowed"):
        sampler().pick(torch.tensor([0.0, bad, 1.0]))
