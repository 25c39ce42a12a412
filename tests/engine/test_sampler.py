"""The next id is chosen as transformers 4.30 chooses it, repeatably, and alone as among others."""

import dataclasses
import random
import sys

import numpy
import pytest
import torch
from reference_sampler import ReferenceSampler

from minigpt4_runtime import RequestError, SamplingParams
from minigpt4_runtime.engine.beam import Continuation
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.engine.sampler import Sampler
from minigpt4_runtime.engine.scheduler import Token
from minigpt4_runtime.engine.sequence import Branch, Sequence

BOS, EOS = 1, 2
PROMPT = (BOS, 3, 3)
SAMPLER = Sampler(bos_id=BOS, eos_id=EOS)


@pytest.fixture(autouse=True, params=[Sampler, ReferenceSampler])
def _each_sampler(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SAMPLER", request.param(bos_id=BOS, eos_id=EOS))


def asking(answer=(), *, number=0, seed=0, **sampling) -> Sequence:
    """A sequence that has said `answer`."""
    request = Request(PROMPT, (), SamplingParams(**sampling))
    sequence = Sequence(number, request, seed=seed, max_new_tokens=300)
    sequence.branches[0].answer += answer
    return sequence


def searching(*branches, number=0, **sampling) -> Sequence:
    """A beam search whose branches have said and come to these (ids, sum)s."""
    sequence = asking(number=number, **sampling)
    sequence.branches = [Branch(list(answer), score) for answer, score in branches]
    return sequence


def pick(logits, sequence):
    """What one sequence chooses from its row of logits."""
    (choice,) = SAMPLER.pick(logits[None], [sequence]).values()
    return choice


def picked_id(logits, answer=(), **sampling) -> int:
    return pick(logits, asking(answer, **sampling)).token_id


def random_logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- greedy -------------------------------------------------------------------------------------


def test_greedy_takes_the_largest():
    assert pick(torch.tensor([0.0, 1.0, 5.0, 4.0]), asking()) == Token(2)


def test_repetition_penalty_counts_bos_and_what_was_chosen_but_no_prompt():
    logits = torch.tensor([1.0, 3.0, -4.0, 2.0])
    # BOS is seen from the start: 3.0 counts as 1.5. The prompt's 3 is not.
    assert picked_id(logits, repetition_penalty=2.0) == 3
    # 3 is seen now as well: 2.0 counts as 1.0.
    assert picked_id(logits, [3], repetition_penalty=2.0) == 1
    assert torch.equal(logits, torch.tensor([1.0, 3.0, -4.0, 2.0]))


def test_what_was_chosen_twice_is_penalised_once():
    logits = torch.tensor([-9.0, -9.0, 1.5, 4.0])
    assert picked_id(logits, [3, 3, 3], repetition_penalty=2.0) == 3


def test_repetition_penalty_pushes_negative_values_down():
    assert picked_id(torch.tensor([-2.5, -1.0, -2.8]), repetition_penalty=3.0) == 0


def test_end_is_forbidden_until_the_minimum():
    logits = torch.tensor([0.0, 1.0, 9.0, 2.0])
    chosen = [picked_id(logits, [3] * count, min_new_tokens=2) for count in range(3)]
    assert chosen == [3, 3, EOS]
    drawn = {picked_id(logits, min_new_tokens=1, temperature=5.0, seed=s) for s in range(100)}
    assert drawn == {0, 1, 3}


def test_presence_counts_once_and_frequency_each_time():
    logits = torch.tensor([0.0, 5.0, 3.0, 4.0])
    assert picked_id(logits, [1, 1], presence_penalty=0.9) == 1
    assert picked_id(logits, [1, 1], presence_penalty=1.5) == 3
    assert picked_id(logits, [1, 1], frequency_penalty=0.4) == 1
    assert picked_id(logits, [1, 1], frequency_penalty=0.6) == 3
    # 1 comes to 2.4, 3 to 2.7, and the prompt's 3s are not counted.
    penalised = {"presence_penalty": 1.0, "frequency_penalty": 0.8}
    assert picked_id(logits, [1, 1], **penalised) == 3
    assert picked_id(logits, [1, 1, 3], **penalised) == EOS
    assert picked_id(logits, presence_penalty=2.0, frequency_penalty=2.0) == 1


def test_negative_penalties_favour_what_was_said():
    logits = torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert picked_id(logits, [0, 0], presence_penalty=-1.5) == 1
    assert picked_id(logits, [0, 0], frequency_penalty=-1.5) == 0


def test_logit_bias_is_added():
    logits = torch.tensor([0.0, 5.0, 3.0, 4.0])
    assert picked_id(logits, logit_bias={1: -100, 3: -1.5}) == EOS
    assert picked_id(logits, logit_bias={0: 5.5}) == 0
    assert draws(torch.zeros(4), logit_bias={1: -100, 2: -100}) == {0, 3}
    assert torch.equal(logits, torch.tensor([0.0, 5.0, 3.0, 4.0]))


def reshaped(values, answer, params):
    """The slow twin, in the order that the sampler's docstring states."""
    values = list(values)
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    for token_id in {BOS, *answer}:
        penalty = params.repetition_penalty
        values[token_id] *= penalty if values[token_id] < 0 else 1 / penalty
    for token_id in set(answer):
        values[token_id] -= params.presence_penalty
        values[token_id] -= params.frequency_penalty * answer.count(token_id)
    if len(answer) < params.min_new_tokens:
        values[EOS] = float("-inf")
    return values


def test_what_reshapes_logits_comes_in_the_stated_order():
    chance = random.Random(1)
    for seed in range(300):
        answer = [chance.randrange(12) for _ in range(chance.randrange(6))]
        params = SamplingParams(
            repetition_penalty=chance.choice((1.0, 0.5, 1.7)),
            presence_penalty=chance.choice((0.0, -1.0, 1.5)),
            frequency_penalty=chance.choice((0.0, -0.5, 0.7)),
            logit_bias={EOS: 4, BOS: chance.uniform(-3, 3), 5: chance.uniform(-3, 3)},
            min_new_tokens=chance.choice((0, 4)),
        )
        logits = random_logits(12, seed=seed)
        expected = reshaped(logits.tolist(), answer, params)
        chosen = pick(logits, asking(answer, **params.to_mapping())).token_id
        assert chosen == expected.index(max(expected))


# --- guides -------------------------------------------------------------------------------------


class Only:
    """A guide that allows some ids, whatever was said."""

    def __init__(self, *ids, size=4):
        self._mask = numpy.isin(numpy.arange(size), ids)

    def allowed(self):
        return self._mask

    def feed(self, token_id):
        pass

    def fork(self):
        return self


class Lost(Only):
    def allowed(self):
        raise RequestError("It went too far.")


def guided(guide, answer=(), **sampling):
    sequence = asking(answer, **sampling)
    request = dataclasses.replace(sequence.request, guide=guide)
    sequence = Sequence(sequence.id, request, seed=sequence.seed, max_new_tokens=300)
    sequence.branches[0].answer += answer
    return sequence


def test_nothing_brings_back_what_a_guide_forbids():
    logits = torch.tensor([0.0, 5.0, 3.0, 4.0])
    assert pick(logits, guided(Only(0, 3))) == Token(3)
    assert pick(logits, guided(Only(0, 3), logit_bias={1: 100, 0: 5})) == Token(0)
    assert pick(logits, guided(Only(0, 3), [3, 3], frequency_penalty=1.9)) == Token(3)
    assert pick(logits, guided(Only(0, 3), [3, 3, 3], frequency_penalty=1.9)) == Token(0)
    lots = {"temperature": 9.0, "top_k": 3, "top_p": 0.99, "min_p": 0.01}
    drawn = {pick(logits, guided(Only(0, 3), seed=s, **lots)).token_id for s in range(200)}
    assert drawn == {0, 3}


def test_logprobs_are_those_before_a_guide():
    logits = torch.tensor([0.0, 5.0, 3.0, 4.0])
    token = pick(logits, guided(Only(0, 3), logprobs=1))
    assert token.token_id == token.logprobs.token_id == 3
    assert token.logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[3]))
    assert token.logprobs.top[0][0] == 1


def test_the_end_is_forbidden_until_the_minimum_unless_the_form_is_complete():
    logits = torch.tensor([0.0, 1.0, 9.0, 2.0])
    assert pick(logits, guided(Only(0, EOS), min_new_tokens=2)) == Token(0)
    assert pick(logits, guided(Only(EOS), min_new_tokens=2)) == Token(EOS)


def test_a_guide_s_error_is_that_of_its_answer_alone():
    logits = torch.tensor([[0.0, 3.0, 1.0, 0.0]] * 3)
    sequences = [asking(number=4), guided(Lost(), number=5), asking(number=6, temperature=0.01)]
    choices = SAMPLER.pick(logits, sequences)
    assert isinstance(choices.pop(5), RequestError)
    assert choices == {4: Token(1), 6: Token(1)}


def test_each_beam_has_a_guide_of_its_own():
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2)
    sequence = searching(([5], -1.0), ([6], -1.0), num_beams=2)
    for branch, guide in zip(sequence.branches, (Only(0), Only(1, EOS)), strict=True):
        branch.guide = guide
    assert ways(continuations(rows, sequence)) == [(1, EOS), (1, 1), (0, 0)]


# --- drawing ------------------------------------------------------------------------------------


def draws(logits, **values) -> set[int]:
    return {picked_id(logits, temperature=1.0, seed=seed, **values) for seed in range(300)}


def test_the_same_seed_gives_the_same_answer():
    logits = random_logits(50, 40)
    first, second, other = (
        [
            picked_id(row, [3] * count, temperature=1.0, seed=seed)
            for count, row in enumerate(logits)
        ]
        for seed in (5, 5, 6)
    )
    assert first == second != other


def test_another_token_of_an_answer_is_another_draw():
    logits = torch.zeros(1000)
    drawn = [picked_id(logits, [3] * count, temperature=1.0, seed=5) for count in range(20)]
    assert len(set(drawn)) > 15


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([1.0, 1.2, 1.1, 0.9, 1.3])
    assert draws(logits, top_k=2) == {1, 4}
    assert draws(logits, top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draws(logits, top_p=0.79) == {0, 1}
    assert draws(logits, top_p=0.01) == {0}
    assert draws(logits, top_p=1.0) == {0, 1, 2, 3}


def test_of_equals_top_p_drops_the_smaller_ids_first():
    assert draws(torch.zeros(32), top_p=0.5) == set(range(16, 32))
    assert draws(torch.zeros(4), top_p=0.5) == {2, 3}


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log() + torch.tensor([0.0, 0.03, 0.02, 0.01])
    assert draws(logits, top_p=0.65, top_k=2) == {0}
    assert draws(logits, top_p=0.65, top_k=3) == {0, 1}


def test_min_p_keeps_what_has_a_share_of_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draws(logits, min_p=0.29) == {0, 1, 2}
    assert draws(logits, min_p=0.31) == {0, 1}
    assert draws(logits, min_p=1.0) == {0}
    assert draws(logits, min_p=0.05) == {0, 1, 2, 3}


def test_min_p_judges_after_temperature():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # At 0.5 the shares are 1, 0.36, 0.09 and 0.01.
    drawn = {picked_id(logits, temperature=0.5, min_p=0.29, seed=seed) for seed in range(300)}
    assert drawn == {0, 1}


def test_top_p_counts_what_min_p_would_drop():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # Of what min-p leaves, the first alone would have 0.62.
    assert draws(logits, min_p=0.5, top_p=0.6) == {0, 1}
    assert draws(logits, min_p=0.29, top_k=2) == {0, 1}


@pytest.mark.parametrize(
    ("temperature", "shares"), [(1.0, [0.6, 0.3, 0.1]), (0.5, [36 / 46, 9 / 46, 1 / 46])]
)
def test_draws_follow_the_distribution(temperature, shares):
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sequences = [asking(number=n, seed=n, temperature=temperature) for n in range(4000)]
    choices = SAMPLER.pick(logits.expand(len(sequences), 3), sequences)
    drawn = torch.tensor([choice.token_id for choice in choices.values()])
    seen = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(seen, torch.tensor(shares), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_no_temperature_is_too_low(temperature):
    logits = torch.tensor([1.0, 2.0, 1.5])
    assert picked_id(logits, temperature=temperature, top_p=0.9, top_k=2) == 1


def test_low_temperature_sharpens():
    logits = torch.tensor([1.0, 2.0, 1.5])
    assert {picked_id(logits, temperature=0.01, seed=s) for s in range(50)} == {1}


# --- many at once -------------------------------------------------------------------------------


def any_sequence(chance, number):
    """A sequence with some mixture of settings; every third is a beam search."""
    answer = [chance.randrange(12) for _ in range(chance.randrange(6))]
    shared = {
        "repetition_penalty": chance.choice((1.0, 1.0, 1.7)),
        "min_new_tokens": chance.choice((0, 0, 4)),
        "presence_penalty": chance.choice((0.0, 0.0, 0.7)),
        "frequency_penalty": chance.choice((0.0, 0.0, -0.4)),
        "logit_bias": chance.choice(((), (), {3: 2.5, 7: -100})),
    }
    if number % 3 == 0:
        num_beams = chance.randint(2, 4)
        branches = [(answer, -chance.random()) for _ in range(chance.choice((1, num_beams)))]
        return searching(*branches, number=number, num_beams=num_beams, **shared)
    return asking(
        answer,
        number=number,
        seed=chance.randrange(100),
        temperature=chance.choice((0.0, 0.0, 0.3, 1.5)),
        top_k=chance.choice((0, 5)),
        top_p=chance.choice((1.0, 0.8)),
        min_p=chance.choice((0.0, 0.2)),
        logprobs=chance.choice((None, None, 2)),
        **shared,
    )


def test_among_others_each_chooses_as_alone():
    chance = random.Random(0)
    sequences = [any_sequence(chance, number) for number in range(200)]
    rows = [random_logits(len(sequence.branches), 12, seed=sequence.id) for sequence in sequences]
    together = SAMPLER.pick(torch.cat(rows), sequences)
    assert list(together) == [sequence.id for sequence in sequences]
    for row, sequence in zip(rows, sequences, strict=True):
        assert SAMPLER.pick(row, [sequence]) == {sequence.id: together[sequence.id]}


def test_the_short_way_to_the_likeliest_is_the_long_one():
    logits = random_logits(200, 12).round()  # Of whole numbers, several are often the largest.
    short = SAMPLER.pick(logits, [asking(number=n) for n in range(200)])
    # Who asks for logprobs goes the long way.
    long = SAMPLER.pick(logits, [asking(number=n, logprobs=0) for n in range(200)])
    assert [each.token_id for each in short.values()] == [each.token_id for each in long.values()]
    assert {each.logprobs for each in short.values()} == {None}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_the_error_of_that_sequence_alone(bad):
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, bad, 1.0], [0.0, 1.0, 3.0], [4.0, 1.0, 3.0]])
    sequences = [
        asking(number=4),
        asking(number=5, temperature=1.0),
        asking(number=6),
        asking(number=7, repetition_penalty=2.0),
    ]
    choices = SAMPLER.pick(logits, sequences)
    assert isinstance(error := choices.pop(5), RequestError)
    assert "overflowed" in str(error)
    assert choices == {4: Token(1), 6: Token(2), 7: Token(0)}


def test_overflow_in_one_branch_is_the_error_of_its_search():
    logits = random_logits(4, 12)
    logits[2, 7] = float("nan")
    beams = searching(([3], -1.0), ([4], -2.0), number=5, num_beams=2)
    choices = SAMPLER.pick(logits, [asking(number=4), beams, asking(number=6)])
    assert isinstance(choices[5], RequestError)
    assert choices[6] == Token(int(logits[3].argmax()))


# --- logprobs -----------------------------------------------------------------------------------


def test_logprobs_tell_of_the_chosen_and_the_likeliest():
    logits = random_logits(12)
    token = pick(logits, asking(logprobs=3))
    expected = logits.log_softmax(-1)
    assert token.logprobs.token_id == token.token_id == int(logits.argmax())
    assert token.logprobs.logprob == pytest.approx(float(expected.max()))
    best = expected.sort(descending=True)
    assert [token_id for token_id, _ in token.logprobs.top] == best.indices[:3].tolist()
    assert [value for _, value in token.logprobs.top] == pytest.approx(best.values[:3].tolist())


def test_logprobs_are_those_before_any_setting():
    logits = torch.tensor([1.0, 5.0, 4.5, 3.0])
    # BOS is penalised, the end forbidden, and the rest sharpened.
    token = pick(
        logits,
        asking(logprobs=2, repetition_penalty=9.0, min_new_tokens=1, temperature=0.1, top_k=1),
    )
    expected = logits.log_softmax(-1).tolist()
    assert token.token_id == token.logprobs.token_id == 3
    assert token.logprobs.logprob == pytest.approx(expected[3])
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 2]
    assert [value for _, value in token.logprobs.top] == pytest.approx(expected[1:3])


def test_of_equals_the_smaller_id_is_the_likelier():
    logits = torch.zeros(300)
    logits[7] = -0.5
    top = pick(logits, asking(logprobs=8)).logprobs.top
    assert [token_id for token_id, _ in top] == [0, 1, 2, 3, 4, 5, 6, 8]


def test_no_more_logprobs_than_there_are_ids():
    logits = torch.tensor([1.0, 3.0, 2.0])
    top = pick(logits, asking(logprobs=20)).logprobs.top
    assert [token_id for token_id, _ in top] == [1, 2, 0]


def test_the_chosen_s_logprob_can_be_had_alone():
    logits = torch.tensor([1.0, 3.0, 2.0])
    logprobs = pick(logits, asking(logprobs=0)).logprobs
    assert logprobs.top == ()
    assert logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[1]))
    assert pick(logits, asking(logprobs=None)).logprobs is None


# --- beams --------------------------------------------------------------------------------------


def continuations(rows, sequence):
    (choice,) = SAMPLER.pick(rows, [sequence]).values()
    return choice


def ways(choice):
    return [(each.branch, each.token_id) for each in choice]


def test_beams_go_on_with_the_best_sums_of_all_branches():
    rows = random_logits(3, 12)
    sums = (-1.0, -2.5, -1.5)
    choice = continuations(rows, searching(*(([5], each) for each in sums), num_beams=3))
    every = sorted(
        (
            Continuation(before + value, branch, token_id)
            for branch, (before, row) in enumerate(zip(sums, rows, strict=True))
            for token_id, value in enumerate(row.log_softmax(-1).tolist())
        ),
        reverse=True,
    )
    assert ways(choice) == ways(every[:6])
    assert [each.score for each in choice] == pytest.approx([each.score for each in every[:6]])


def test_the_first_beams_all_come_from_one_branch():
    rows = random_logits(1, 12)
    choice = continuations(rows, searching(([], 0.0), num_beams=3))
    assert ways(choice) == [(0, each) for each in rows[0].topk(6).indices.tolist()]


def test_beams_are_no_more_than_there_are_ids():
    assert len(continuations(random_logits(1, 5), searching(([], 0.0), num_beams=4))) == 5


def test_beams_forbid_the_end_until_the_minimum():
    rows = torch.tensor([[1.0, 2.0, 9.0, 3.0]])
    early = continuations(rows, searching(([5], -1.0), num_beams=2, min_new_tokens=2))
    assert ways(early) == [(0, 3), (0, 1), (0, 0)]
    late = continuations(rows, searching(([5, 6], -1.0), num_beams=2, min_new_tokens=2))
    assert ways(late)[0] == (0, EOS)


def test_beams_are_biased_and_penalised_each_by_what_it_said():
    rows = torch.zeros(2, 4)
    sequence = searching(
        ([0], -1.0), ([3], -1.0), num_beams=2, presence_penalty=0.5, logit_bias={1: 0.2, 2: -100}
    )
    uniform = float(torch.zeros(4).log_softmax(-1)[0])
    choice = continuations(rows, sequence)
    assert ways(choice[:2]) == [(0, 1), (1, 1)]
    assert sorted(ways(choice[2:])) == [(0, 3), (1, 0)]
    expected = [uniform - 0.8, uniform - 0.8, uniform - 1.0, uniform - 1.0]
    assert [each.score for each in choice] == pytest.approx(expected)


def test_beams_penalise_the_log_probabilities_of_what_a_branch_said():
    rows = torch.tensor([0.48, 0.1, 0.15, 0.27]).log().expand(2, 4)
    sums = torch.tensor([1.0, 0.9]).log().tolist()
    sequence = searching(([0], sums[0]), ([3], sums[1]), num_beams=2, repetition_penalty=2.0)
    choice = continuations(rows, sequence)
    assert ways(choice) == [(1, 0), (0, 3), (0, 0), (0, 2)]
    assert torch.allclose(
        torch.tensor([each.score for each in choice]).exp(),
        torch.tensor([0.9 * 0.48, 0.27, 0.48**2, 0.15]),
    )
