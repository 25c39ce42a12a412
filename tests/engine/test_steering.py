"""Functions between the logits and the choice: what they see, what they change, whom they fail."""

import sys
from dataclasses import replace

import numpy
import pytest
import torch
from fake_executor import (
    BOS,
    OUT_OF_MEMORY,
    Executor,
    PacedExecutor,
    by_state,
    events_of,
    ids_of,
    request_of,
    slow_twin,
    submit_together,
)
from fake_runner import END, VOCABULARY, state_after
from test_running_ahead import SlowDevice

from minigpt4_runtime import RequestError, SamplingParams
from minigpt4_runtime.engine.request import Beside, Request

NEVER = -torch.inf


def forbid_the_even(seen):
    """Leaves odd ids alone, and writes into what it was given."""
    seen.logits[:, ::2] = NEVER
    return seen.logits


def contrast(seen):
    return 2 * seen.logits - seen.branches["other"] / 2


def no_id_twice(seen):
    for row, ids in zip(seen.logits, seen.ids, strict=True):
        row[ids] = NEVER
    return seen.logits


def logits_of(*token_ids):
    """What `by_state` says behind these ids."""
    state = 0
    for token_id in token_ids:
        state = state_after(state, token_id)
    return by_state(None, state)


def steered(request, *processors, **prompts):
    beside = tuple(Beside(name, tuple(ids)) for name, ids in prompts.items())
    return replace(request, processors=processors, beside=beside)


def contrasted_by_hand(request):
    answer = []
    while len(answer) < request.sampling.max_new_tokens and END not in answer:
        own, other = (logits_of(*each.token_ids, *answer) for each in (request, *request.beside))
        answer.append(int((2 * own - other / 2).argmax()))
    return answer


def test_all_that_is_steered_side_by_side_with_what_is_not(start):
    engine = start(Executor(by_state), num_blocks=30, max_running=8)
    plain = [request_of(BOS, number, max_new_tokens=9) for number in (7, 9, 10)]
    asked = [steered(each, contrast, other=[BOS, 4, 5, 6, 8][number:]) for number, each in
             enumerate(plain)]  # fmt: skip
    odd = [
        steered(request_of(BOS, number, max_new_tokens=5), forbid_the_even, no_id_twice)
        for number in (7, 9, 10)
    ]
    requests = [*asked, *plain, *odd]
    found = list(map(ids_of, [engine.submit(each, lambda event: event) for each in requests]))
    assert found[:3] == list(map(contrasted_by_hand, asked))
    assert found[3:6] == list(map(slow_twin, plain))
    for ids in found[6:]:
        assert all(each % 2 for each in ids)
        assert len(set(ids)) == len(ids)
    # All blocks of what was beside are given back: `start` checks it.


def test_requests_of_one_processor_are_given_together(start):
    sizes, executor = [], PacedExecutor(by_state)
    engine = start(executor)

    def count(seen):
        sizes.append([len(seen.logits), [len(each) for each in seen.ids]])
        return seen.logits

    requests = [
        steered(request_of(BOS, number, max_new_tokens=length, ignore_eos=True), count)
        for number, length in ((7, 3), (9, 2))
    ]
    tickets = submit_together(engine, executor, requests)
    executor.let_run()
    assert [len(ids_of(each)) for each in tickets] == [3, 2]
    assert sizes == [[1, [0]], [2, [1, 0]], [2, [2, 1]]]


@pytest.mark.parametrize("start", ["ahead"], indirect=True)
def test_a_step_is_launched_before_the_one_that_is_steered_is_read(start, monkeypatch):
    device = SlowDevice(monkeypatch)
    request = request_of(BOS, 3, max_new_tokens=3)
    asked = steered(request, no_id_twice, other=[BOS, 5])
    assert ids_of(start(device).submit(asked, lambda event: event)) == [4, 5, 6]
    assert device.log == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"logprobs": 2}, {"temperature": 0.9, "seed": 3}, {"min_new_tokens": 4},
     {"repetition_penalty": 1.7}],
)  # fmt: skip
def test_processors_come_before_all_settings(start, settings):
    """As if the model itself had said so."""

    def shifted(piece, state):
        return by_state(piece, state).roll(3) * 0.7

    def shift(seen):
        return seen.logits.roll(3, dims=-1) * 0.7

    request = request_of(BOS, 7, max_new_tokens=6, **settings)
    by_model = events_of(start(Executor(shifted)).submit(request, lambda event: event))
    engine = start(Executor(by_state))
    assert events_of(engine.submit(steered(request, shift), lambda event: event)) == by_model


def fail_at_the_third(seen):
    if any(len(ids) == 2 for ids in seen.ids):
        raise ValueError("the third id")
    return seen.logits


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (fail_at_the_third, r"fail_at_the_third failed \(ValueError: the third id\)"),
        (lambda seen: seen.logits[:, :3], r"gave \(1, 3\)\. Return .* of \(1, 11\)"),
        (lambda seen: None, r"gave NoneType\. Return"),
        (lambda seen: seen.logits + 0j, r"gave complex numbers\. Return .* of \(1, 11\)"),
        (lambda seen: sys.exit("enough"), r"failed \(SystemExit: enough\)"),
        (lambda seen: seen.logits.to("meta"), r"failed \(NotImplementedError: Cannot copy"),
        (lambda seen: seen.logits * NEVER, "left no id to choose"),
        (lambda seen: torch.full_like(seen.logits, NEVER), "left no id to choose"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_processor_that_fails_ends_its_request_alone(start, processor, message, num_beams):
    engine = start(Executor(by_state))
    others = [request_of(BOS, number, max_new_tokens=9) for number in (9, 10)]
    spared = steered(others[1], no_id_twice)
    asked = steered(request_of(BOS, 7, max_new_tokens=9, num_beams=num_beams), processor)
    tickets = [engine.submit(each, lambda event: event) for each in (others[0], asked, spared)]
    with pytest.raises(RequestError, match=message):
        events_of(tickets[1])
    assert ids_of(tickets[0]) == slow_twin(others[0])
    ids = ids_of(tickets[2])
    assert len(set(ids)) == len(ids)


class EvenAlone:
    """A form of even ids."""

    def allowed(self):
        return numpy.arange(VOCABULARY) % 2 == 0

    def feed(self, token_id):
        assert token_id % 2 == 0

    def fork(self):
        return self


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_form_and_a_processor_that_leave_nothing_between_them(start, num_beams):
    engine = start(Executor(by_state))
    request = request_of(BOS, 7, max_new_tokens=9, num_beams=num_beams)
    formed = steered(replace(request, guide=EvenAlone()), forbid_the_even)
    with pytest.raises(RequestError, match="left no id to choose"):
        events_of(engine.submit(formed, lambda event: event))
    helped = steered(replace(request, guide=EvenAlone()), lambda seen: seen.logits)
    assert all(each % 2 == 0 for each in ids_of(engine.submit(helped, lambda event: event)))


def test_a_processor_that_waits_for_its_own_engine(start):
    """It would wait forever, and all others with it; another engine may be asked."""
    own, other = start(Executor(by_state)), start(Executor(by_state))
    plain, beside = (request_of(BOS, number, max_new_tokens=4) for number in (7, 9))

    def asking(engine):
        def ask(seen):
            list(engine.submit(beside, lambda event: event))
            return seen.logits

        return steered(plain, ask)

    with pytest.raises(RequestError, match=r"ask failed .*waits for an answer of the model that"):
        events_of(own.submit(asking(own), lambda event: event))
    assert ids_of(own.submit(asking(other), lambda event: event)) == slow_twin(plain)


def test_one_of_a_batch_is_at_fault(start):
    def picky(seen):
        if any(7 in ids.tolist() for ids in seen.ids):
            raise ValueError("no sevens")
        return seen.logits

    executor = PacedExecutor()
    engine = start(executor)
    limits = {"max_new_tokens": 4, "ignore_eos": True}
    requests = [steered(request_of(BOS, number, **limits), picky) for number in (5, 0)]
    tickets = submit_together(engine, executor, requests)
    executor.let_run()
    with pytest.raises(RequestError, match=r"picky failed \(ValueError: no sevens\)"):
        events_of(tickets[0])
    assert ids_of(tickets[1]) == [1, 2, 3, 4]


def test_numbers_that_overflow_are_not_the_processors_fault(start):
    executor = Executor(by_state)
    executor.overflowing = {0}
    asked = steered(request_of(BOS, 7, max_new_tokens=9), no_id_twice, other=[BOS, 5])
    with pytest.raises(RequestError, match="overflowed"):
        events_of(start(executor).submit(asked, lambda event: event))


def test_what_cannot_run_is_refused(start):
    engine = start(Executor(), num_blocks=4, max_running=3)

    def refused(message, others, **sampling):
        with pytest.raises(RequestError, match=message):
            engine.room.check(2, SamplingParams(**{"max_new_tokens": 4, **sampling}), beside=others)

    refused("num_beams is 2 and there are branches", [2], num_beams=2)
    refused("its branches are 4, but only 3 run", [2] * 3)
    refused("its branches take 6 blocks of the cache, which has 4", [2] * 2, max_new_tokens=6)
    refused("has 16 tokens and the engine's cache holds 16", [16])
    with pytest.raises(RequestError, match=r"17 tokens and a candidate of 1 do not fit.* 16"):
        engine.submit(
            Request((BOS,) * 17, (), SamplingParams(), candidates=((3,),)), lambda event: event
        )


# --- given answers ------------------------------------------------------------------------------

CANDIDATES = ((3,), (4, 5, 6), (3, 3), *(((n % VOCABULARY,) * (1 + n % 4)) for n in range(30)))


def scored_by_hand(request):
    return [
        sum(
            float(logits_of(*request.token_ids, *each[:place]).log_softmax(-1)[token_id])
            for place, token_id in enumerate(each)
        )
        for each in request.candidates
    ]


def test_candidates_are_scored_beside_answers(start):
    """One runs out of memory meanwhile, and there is room for few at once."""
    executor, troubles = Executor(by_state), [OUT_OF_MEMORY[0]]
    engine = start(executor, num_blocks=14, max_running=12, max_step_tokens=13)
    executor.trouble = lambda plan: (
        troubles.pop() if troubles and len({each.sequence_id for each in plan.slices}) > 1 else None
    )
    answered = request_of(BOS, 9, max_new_tokens=9)
    asked = [
        Request((BOS, *range(3, 3 + more)), (), SamplingParams(), candidates=CANDIDATES[:count])
        for more, count in ((0, 33), (5, 1), (8, 33), (4, 3))
    ]
    requests = [answered, *asked]
    tickets = [engine.submit(each, lambda event: event) for each in requests]
    assert ids_of(tickets[0]) == slow_twin(answered)
    for ticket, request in zip(tickets[1:], asked, strict=True):
        (event,) = events_of(ticket)
        assert event.note == pytest.approx(scored_by_hand(request), abs=1e-5)
    assert engine.stats().num_preempted


def test_a_prompt_is_computed_once_for_its_candidates(start):
    executor = Executor(by_state)
    engine = start(executor, prefix_cache=False)
    asked = Request((BOS,) * 41, (), SamplingParams(), candidates=((3,), (4, 5, 6), (7, 8)))
    events_of(engine.submit(asked, lambda event: event))
    # The last id of a candidate is never computed, the prompt's last token by each.
    assert engine.stats().num_computed_tokens == 40 + 1 + 3 + 2


def test_what_is_asked_again_comes_from_the_cache(start):
    """Whole blocks of all prompts; of a lone candidate no row is left out."""
    engine = start(Executor(by_state))
    limits = {"max_new_tokens": 2, "ignore_eos": True}
    request = steered(request_of(*[BOS] * 9, **limits), contrast, other=[3] * 13)
    lone = Request((BOS,) * 6, (), SamplingParams(), candidates=((3, 4, 5, 6, 7, 8, 9, 10, 3),))
    for _ in range(2):
        before = engine.stats().num_reused_tokens
        assert ids_of(engine.submit(request, lambda event: event)) == contrasted_by_hand(request)
        (event,) = events_of(engine.submit(lone, lambda event: event))
        assert event.note == pytest.approx(scored_by_hand(lone), abs=1e-5)
    assert engine.stats().num_reused_tokens - before == 8 + 12 + 4


def test_candidates_whose_numbers_overflow(start):
    executor = Executor(by_state)
    executor.overflowing = {0}
    asked = Request((BOS, 3), (), SamplingParams(), candidates=((3,), (4, 5)))
    with pytest.raises(RequestError, match="overflowed"):
        events_of(start(executor).submit(asked, lambda event: event))
