"""What becomes of requests: each has its own answer and its own end."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_executor import (
    BLOCK_SIZE,
    BOS,
    ENDLESS,
    Executor,
    PacedExecutor,
    by_state,
    events_of,
    ids_of,
    request_of,
    slow_twin,
    submit,
    submit_together,
    wait_until_idle,
)
from fake_runner import (
    END,
    PLACEHOLDER,
    VOCABULARY,
    SumWatch,
)

from minigpt4_runtime import PromptTooLongError, RequestError, SamplingParams
from minigpt4_runtime.engine.request import ImageInput, Request

# --- one answer ---------------------------------------------------------------------------------


def test_it_ends_at_the_end_id(start):
    events = events_of(submit(start(Executor()), BOS, 9))
    assert [event.token_id for event in events] == [10, 0, 1, END]
    assert [event.finish_reason for event in events] == [None, None, None, "stop"]


def test_it_ends_at_the_asked_length_and_computes_nothing_more(start):
    executor = Executor()
    engine = start(executor)
    events = events_of(submit(engine, BOS, 3, max_new_tokens=2))
    assert [event.token_id for event in events] == [4, 5]
    assert events[-1].finish_reason == "length"
    wait_until_idle(engine)
    computed = [piece.token_ids for plan in executor.known for piece in plan.slices]
    assert computed == [(BOS, 3), (4,)]


@pytest.mark.parametrize("limits", [{"max_context": 12}, {"num_blocks": 3}])
@pytest.mark.parametrize("num_prompt", [10, 11])
def test_it_ends_where_the_context_or_the_cache_ends(start, limits, num_prompt):
    events = events_of(submit(start(Executor(), **limits), *[BOS] * (num_prompt - 1), 3, **ENDLESS))
    assert len(events) == 12 - num_prompt
    assert events[-1].finish_reason == "length"


def test_the_end_id_can_be_ignored(start):
    events = events_of(submit(start(Executor()), BOS, ignore_eos=True, max_new_tokens=4))
    assert [event.token_id for event in events] == [END, 3, 4, 5]
    assert events[-1].finish_reason == "length"


def test_a_watch_ends_an_answer_and_is_left_as_it_was(start):
    engine, request = start(Executor()), request_of(BOS, 3, watch=SumWatch(15))
    for _ in range(2):
        events = events_of(engine.submit(request, lambda event: event))
        assert [event.token_id for event in events] == [4, 5, 6]
        assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_events_carry_what_the_watch_noted(start, num_beams):
    asked = request_of(BOS, 3, watch=SumWatch(1000), num_beams=num_beams, max_new_tokens=4)
    *events, last = events_of(start(Executor(by_state)).submit(asked, lambda event: event))
    ids = [event.token_id for event in (*events, last)]
    assert [event.note for event in events] == [
        (total, False) for total in itertools.accumulate(ids[:-1])
    ]
    assert last.note == (sum(ids), True)


def test_an_event_tells_the_logprobs_that_were_asked_for(start):
    events = events_of(submit(start(Executor()), BOS, 3, max_new_tokens=3, logprobs=1))
    assert [event.logprobs.top[0][0] for event in events] == [4, 5, 6]


def test_pictures_reach_the_runner_by_their_digest(start):
    executor = Executor()
    cat, dog = (ImageInput(torch.zeros(3, 2, 2), name, 1, 2) for name in ("cat", "dog"))
    engine, token_ids = start(executor), (BOS, PLACEHOLDER, PLACEHOLDER, 3)
    for picture in (cat, dog):
        request = Request(token_ids, (picture,), SamplingParams(max_new_tokens=2))
        assert ids_of(engine.submit(request, lambda event: event)) == [4, 5]
    assert executor.pixels == {"cat": cat.pixels, "dog": dog.pixels}
    parts = [part for plan in executor.plans for piece in plan.slices for part in piece.images]
    assert [(part.digest, part.num_rows) for part in parts] == [("cat", 2), ("dog", 2)]


def test_without_a_seed_every_answer_is_another(start):
    engine = start(Executor(lambda piece, state: torch.zeros(VOCABULARY)))

    def drawn(seed):
        return ids_of(submit(engine, BOS, 3, temperature=1.0, seed=seed, max_new_tokens=40,
                             ignore_eos=True))  # fmt: skip

    assert drawn(5) == drawn(5)
    assert drawn(None) != drawn(None)


def test_what_was_done_is_counted(start):
    engine = start(Executor())
    for _ in range(2):
        events_of(submit(engine, BOS, 1, 1, 1, 3, max_new_tokens=3))
    wait_until_idle(engine)
    stats = engine.stats()
    assert stats.num_steps == 6
    assert stats.num_computed_tokens == (5 + 1 + 1) + (1 + 1 + 1)
    assert stats.num_reused_tokens == BLOCK_SIZE
    assert stats.num_free_blocks == stats.num_blocks


# --- what is refused ----------------------------------------------------------------------------


def refusal(engine, kind, *token_ids, **sampling):
    """The error, which comes before any work."""
    with pytest.raises(kind) as seen:
        submit(engine, *token_ids, **sampling)
    assert engine._thread is None
    return seen.value


def test_a_prompt_that_fills_the_context_is_refused(start):
    error = refusal(start(Executor(), max_context=12), PromptTooLongError, *[BOS] * 12)
    assert (error.num_tokens, error.limit) == (12, 12)
    assert "12 tokens and the model's context holds 12" in str(error)


def test_a_prompt_that_fills_the_cache_is_refused(start):
    error = refusal(start(Executor(), num_blocks=2), PromptTooLongError, *[BOS] * 8)
    assert (error.num_tokens, error.limit) == (8, 2 * BLOCK_SIZE)
    assert "8 tokens and the engine's cache holds 8" in str(error)


def test_more_beams_than_may_run_are_refused(start):
    engine = start(Executor(), max_running=3)
    error = refusal(engine, RequestError, BOS, num_beams=4, max_new_tokens=5)
    assert "num_beams is 4, but only 3" in str(error)
    assert len(ids_of(submit(engine, BOS, num_beams=3, max_new_tokens=5, ignore_eos=True))) == 5


def test_beams_are_refused_that_could_come_to_lack_blocks(start):
    # A full block of the prompt is shared; each beam's own 2 + 4 tokens take two.
    search = {"num_beams": 3, "max_new_tokens": 5, "ignore_eos": True}
    error = refusal(start(Executor(), num_blocks=6), RequestError, *[BOS] * 6, **search)
    assert "3 beams on a prompt of 6 tokens takes 7 blocks of the cache, which has 6" in str(error)
    assert len(ids_of(submit(start(Executor(), num_blocks=7), *[BOS] * 6, **search))) == 5


# --- many answers -------------------------------------------------------------------------------


def random_requests(count, **sampling):
    chance = random.Random(0)
    pieces = ((3, 4), (5, 6, 7, 8, 9), (10,), (0, 0, 0))
    requests = []
    for _ in range(count):
        ids = [BOS, *(i for piece in chance.choices(pieces, k=3) for i in piece)]
        watch = SumWatch(9) if chance.random() < 0.3 else None
        max_new_tokens = chance.randint(1, 12)
        requests.append(request_of(*ids, watch=watch, max_new_tokens=max_new_tokens, **sampling))
    return requests


def test_all_get_their_own_answers_from_several_threads(start):
    engine = start(Executor(by_state), num_blocks=12, max_running=4, max_step_tokens=16)

    def answers(requests):
        return list(map(ids_of, [engine.submit(each, lambda event: event) for each in requests]))

    requests = random_requests(96)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answers, [requests[first::6] for first in range(6)]))
    assert together == [list(map(slow_twin, requests[first::6])) for first in range(6)]


def test_a_search_finds_among_others_what_it_finds_alone(start):
    alone, crowded = start(Executor(by_state)), start(Executor(by_state), num_blocks=30)
    requests = random_requests(10, num_beams=3) + random_requests(10)
    tickets = [crowded.submit(request, lambda event: event) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        assert events_of(ticket) == events_of(alone.submit(request, lambda event: event))


@pytest.mark.parametrize("leave", ["cancel", "drop"])
def test_who_leaves_frees_the_blocks_before_the_next_step(start, leave):
    executor = PacedExecutor()
    engine = start(executor)
    leaving, staying = submit_together(
        engine, executor, [request_of(BOS, 4, **ENDLESS), request_of(BOS, 3, max_new_tokens=9)]
    )
    executor.go_on()
    assert {piece.sequence_id for piece in executor.next_plan().slices} == {0, 1}
    assert engine.stats().num_running == 2
    if leave == "cancel":
        leaving.cancel()
    del leaving
    executor.go_on()
    (piece,) = executor.next_plan().slices
    assert piece.sequence_id == 1
    assert engine.stats().num_free_blocks == engine.stats().num_blocks - 1
    executor.let_run()
    assert ids_of(staying) == [4, 5, 6, 7, 8, 9, 10, 0, 1]


def test_who_leaves_while_waiting_never_runs(start):
    executor = PacedExecutor()
    engine = start(executor, max_running=1)
    first, leaving, last = submit_together(
        engine, executor, [request_of(BOS, number, max_new_tokens=3) for number in (3, 4, 5)]
    )
    executor.go_on()
    executor.next_plan()
    assert engine.stats().num_waiting == 2
    leaving.cancel()
    executor.let_run()
    assert [ids_of(first), ids_of(leaving), ids_of(last)] == [[4, 5, 6], [], [6, 7, 8]]
    assert {piece.sequence_id for plan in executor.plans for piece in plan.slices} == {0, 2}
