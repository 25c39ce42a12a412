"""The loop around the model: when it ends, what it refuses, and what it lets go."""

from types import SimpleNamespace

import pytest
import torch

from minigpt4_runtime import ConfigError, PromptTooLongError, RequestError, SamplingParams
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import Request

BOS, EOS, LIMIT = 1, 2, 12


class CountingRunner:
    """Always prefers the id after the last one; remembers what it was asked."""

    def __init__(self, *, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.error = error
        language = SimpleNamespace(max_position_embeddings=LIMIT)
        self.config = SimpleNamespace(language=language)
        self.fails_at = fails_at
        self.slots = None
        self.fed: list[int] = []

    def new_cache(self, num_slots):
        self.slots = num_slots

    def embed(self, request):
        return list(request.token_ids)

    def embed_token(self, token_id):
        return [token_id]

    def forward(self, ids, cache):
        self.fed += ids
        assert len(self.fed) <= self.slots
        if self.fails_at == len(self.fed):
            raise self.error
        logits = torch.zeros(10)
        logits[(ids[-1] + 1) % 10] = 1.0
        return logits


def generate(runner, token_ids, **sampling):
    engine = Engine(runner, bos_id=BOS, eos_id=EOS)
    request = Request(tuple(token_ids), (), SamplingParams(**sampling))
    return engine.generate(request)


def test_it_ends_at_the_end_id():
    events = list(generate(CountingRunner(), [BOS, 9]))
    assert [event.token_id for event in events] == [0, 1, EOS]
    assert [event.finish_reason for event in events] == [None, None, "stop"]


def test_it_ends_at_the_asked_length_and_computes_nothing_more():
    runner = CountingRunner()
    events = list(generate(runner, [BOS, 3], max_new_tokens=2))
    assert [event.token_id for event in events] == [4, 5]
    assert events[-1].finish_reason == "length"
    assert runner.fed == [BOS, 3, 4]


def test_it_ends_where_the_context_ends():
    events = list(generate(CountingRunner(), [BOS] * 9 + [3], ignore_eos=True))
    assert len(events) == LIMIT - 10
    assert events[-1].finish_reason == "length"


def test_the_end_id_can_be_ignored():
    events = list(generate(CountingRunner(), [BOS], ignore_eos=True, max_new_tokens=4))
    assert [event.token_id for event in events] == [2, 3, 4, 5]


def test_what_cannot_be_served_is_refused_before_the_first_step():
    runner = CountingRunner()
    with pytest.raises(PromptTooLongError, match="12 tokens"):
        generate(runner, [BOS] * LIMIT)
    with pytest.raises(ConfigError, match="no beam search"):
        generate(runner, [BOS], num_beams=3)
    assert runner.fed == []


def test_closing_ends_the_work():
    runner = CountingRunner()
    events = generate(runner, [BOS, 3])
    next(events)
    events.close()
    assert runner.fed == [BOS, 3]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_said(error):
    events = generate(CountingRunner(fails_at=4, error=error), [BOS, 3, 4])
    assert next(events).token_id == 5
    with pytest.raises(RequestError, match="out of memory on a prompt of 3 tokens"):
        next(events)


def test_other_errors_pass_through():
    events = generate(CountingRunner(fails_at=2, error=RuntimeError("a bug")), [BOS, 3])
    with pytest.raises(RuntimeError, match="a bug"):
        next(events)
