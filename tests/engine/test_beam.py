"""Which answer a beam search ends with, against what its definition says. No torch."""

from dataclasses import dataclass

import pytest
from fake_runner import log_probability
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.engine.beam import BeamSearch, Continuation, Hypothesis

END = 2


def step(search, continuations, answers=((),)):
    """Give it (sum, branch, id)s; gives the ids that go on."""
    going_on = search.choose(
        [Continuation(*each) for each in continuations], answers, lambda each: each.token_id == END
    )
    return [each.token_id for each in going_on]


def test_the_best_that_do_not_end_go_on():
    search = BeamSearch(2, 1.0, 10)
    assert step(search, [(-1.0, 0, 7), (-2.0, 0, END), (-3.0, 0, 8), (-4.0, 0, 9)]) == [7, 8]
    assert not search.is_done


def test_the_length_counts_bos_and_leaves_out_the_end():
    search = BeamSearch(2, 1.0, 10)
    assert step(search, [(-6.0, 1, END), (-8.0, 0, END)], [[5, 6, 7], [5, 6, 8]]) == []
    assert search.best() == Hypothesis(-6.0 / 4, (5, 6, 8, END), "stop")


def test_the_length_of_what_does_not_end_counts_all_of_it():
    search = BeamSearch(2, 1.0, 3)
    step(search, [(-6.0, 1, 9), (-7.0, 0, 9)], [[5, 6], [5, 7]])
    assert search.is_done
    assert search.best() == Hypothesis(-6.0 / 4, (5, 7, 9), "length")


def test_an_end_beyond_the_best_does_not_count():
    search = BeamSearch(2, 0.0, 2)
    step(search, [(-1.0, 0, 7), (-2.0, 0, 8), (-2.0, 0, END)])
    # If it had counted, it would have been better than what follows.
    step(search, [(-3.0, 0, 9), (-4.0, 1, 9)], [[7], [8]])
    assert search.best().token_ids == (7, 9)


@pytest.mark.parametrize(("best_sum", "is_done"), [(-11.75, False), (-12.0, True)])
def test_it_is_done_when_nothing_can_become_better_than_the_worst_finished(best_sum, is_done):
    search = BeamSearch(2, 1.0, 10)
    step(search, [(-1.0, 0, 7), (-2.0, 0, END), (-5.0, 0, 8)])
    step(search, [(-5.0, 0, 9), (-6.0, 0, END), (-7.0, 1, 9)], [[7], [8]])
    # The worst finished is -6 over 2, and the next ones are counted as 4 long.
    step(search, [(best_sum, 0, 9), (-20.0, 1, 9)], [[7, 9], [8, 9]])
    assert search.is_done == is_done


def test_it_is_not_done_before_as_many_finished_as_there_are_beams():
    search = BeamSearch(2, 1.0, 10)
    step(search, [(-1.0, 0, END), (-50.0, 0, 7), (-60.0, 0, 8)])
    assert not search.is_done


def test_it_is_done_when_nothing_goes_on():
    search = BeamSearch(2, 1.0, 10)
    assert step(search, [(-1.0, 0, END)]) == []
    assert search.is_done


def test_of_equal_answers_the_last_one_is_taken():
    search = BeamSearch(3, 0.0, 2)
    step(search, [(-1.0, 0, 7), (-2.0, 0, END), (-3.0, 0, 8), (-3.5, 0, 9)])
    step(search, [(-2.0, 1, 9), (-2.0, 0, 9), (-4.0, 2, 9)], [[7], [8], [9]])
    assert search.best() == Hypothesis(-2.0, (7, 9), "length")


def test_an_answer_that_is_no_better_takes_no_other_s_place():
    search = BeamSearch(2, 0.0, 1)
    step(search, [(-2.0, 0, 7), (-2.0, 0, END), (-2.0, 0, 8)])
    assert search.best().token_ids == (7,)


@pytest.mark.parametrize(
    ("length_penalty", "best"), [(2.0, (7, 9)), (1.0, (7, 9)), (0.0, (END,)), (-1.0, (END,))]
)
def test_the_penalty_favours_long_answers_and_a_negative_one_short_ones(length_penalty, best):
    search = BeamSearch(2, length_penalty, 2)
    step(search, [(-1.0, 0, 7), (-2.0, 0, END), (-3.0, 0, 8)])
    step(search, [(-3.0, 0, 9), (-4.0, 1, 9)], [[7], [8]])
    assert search.best().token_ids == best


def test_a_negative_penalty_multiplies():
    search = BeamSearch(2, -2.0, 2)
    step(search, [(-3.0, 0, 9), (-4.0, 1, 9)], [[7], [8]])
    assert search.best().score == -3.0 * 3**2


# --- against the definition ---------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A search in a small made-up language."""

    language: int
    num_ids: int
    num_beams: int
    length_penalty: float
    max_new_tokens: int
    divisor: int | None  # Ids that add up to a multiple of it end an answer too.

    def ends(self, ids):
        return ids[-1] == END or (self.divisor is not None and sum(ids) % self.divisor == 0)

    def continuations(self, beams):
        """The best ways on from these (sum, ids), as the sampler gives them."""
        every = [
            Continuation(
                total + log_probability(hash((self.language, *ids)), next_id), index, next_id
            )
            for index, (total, ids) in enumerate(beams)
            for next_id in range(self.num_ids)
        ]
        return sorted(every, key=lambda each: -each.score)[: 2 * self.num_beams]


def search_in_steps(question):
    search = BeamSearch(question.num_beams, question.length_penalty, question.max_new_tokens)
    beams, num_steps = [(0.0, ())], 0
    while not search.is_done:
        answers = [ids for _, ids in beams]
        chosen = search.choose(
            question.continuations(beams),
            answers,
            lambda each, answers=answers: question.ends((*answers[each.branch], each.token_id)),
        )
        beams = [(each.score, (*answers[each.branch], each.token_id)) for each in chosen]
        num_steps += 1
    return search.best(), num_steps


def search_by_definition(question):
    """The same without forgetting any finished answer."""
    count, penalty = question.num_beams, question.length_penalty
    beams, finished = [(0.0, ())], []
    for num_new in range(1, question.max_new_tokens + 1):
        ways = [
            (each.score, (*beams[each.branch][1], each.token_id))
            for each in question.continuations(beams)
        ]
        finished += [
            Hypothesis(total / num_new**penalty, ids, "stop")
            for total, ids in ways[:count]
            if question.ends(ids)
        ]
        beams = [(total, ids) for total, ids in ways if not question.ends(ids)][:count]
        attainable = ways[0][0] / (1 + num_new) ** penalty
        kept = sorted((each.score for each in finished), reverse=True)[:count]
        if not beams or (len(kept) == count and kept[-1] >= attainable):
            break
    else:
        finished += [
            Hypothesis(total / (1 + num_new) ** penalty, ids, "length") for total, ids in beams
        ]
    best_score = max(each.score for each in finished)
    # What comes after as many equal answers as there are beams finds no worse one to replace.
    equals = [each for each in finished if each.score == best_score][:count]
    return equals[-1], num_new


QUESTIONS = st.builds(
    Question,
    language=st.integers(0, 10**6),
    num_ids=st.integers(3, 8),
    num_beams=st.integers(2, 5),
    length_penalty=st.sampled_from((1.0, 1.0, 0.0, 0.0, 2.0, 0.5, -1.0, -2.5)),
    max_new_tokens=st.integers(1, 8),
    divisor=st.sampled_from((None, 3, 7)),
)


@settings(max_examples=400, deadline=None)
@given(QUESTIONS)
def test_the_search_gives_what_its_definition_says(question):
    assert search_in_steps(question) == search_by_definition(question)
