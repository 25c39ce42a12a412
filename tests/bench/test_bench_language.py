"""How fast answers grow: what is counted, and what happens where memory ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime.bench import language
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.language import AnswerTimes, LanguageBench, Work
from minigpt4_runtime.devices import cpu
from minigpt4_runtime.engine.runner import Runner


def test_the_clock_of_two_answers():
    # The second answer's prompt is read between the first one's tokens.
    answered = AnswerTimes(10.0, [[11.0, 12.5, 13.0, 13.5], [12.6, 13.1, 13.6, 14.1]])
    assert answered.response_time_ms == pytest.approx(4100)
    assert answered.first_token_ms == pytest.approx(1800)
    assert answered.later_tokens_ms == pytest.approx([500, 500, 500, 500])


def test_answers_that_never_grow_together_count_whole():
    answered = AnswerTimes(0.0, [[1.0, 1.5], [2.0, 2.25]])
    assert answered.later_tokens_ms == pytest.approx([500, 250])


def test_a_single_token_has_none_after_it():
    assert AnswerTimes(0.0, [[1.0], [1.0]]).later_tokens_ms == []


@given(st.integers(1, 256), st.integers(1, 4000), st.integers(1, 600))
def test_prompts_are_read_within_half_of_an_answer(batch_size, input_length, output_length):
    work = Work(batch_size, input_length, output_length)
    per_step = work.step_tokens - batch_size  # What decoding answers may leave of a budget.
    in_time = per_step * max(1, output_length // 2) >= batch_size * input_length
    assert in_time or per_step == 8192
    assert per_step <= 8192
    config = work.engine_config()
    blocks = -(-(input_length + output_length) // config.block_size)
    # One more for each than it fills: the scheduler keeps that back for those that run.
    assert config.num_blocks == batch_size * (blocks + 1)
    assert config.max_running == batch_size


def test_a_point_says_what_the_numbers_say(demo_model):
    work = Work(3, 20, 8)
    tried = LanguageBench(demo_model, repeats=2).measure(work)
    point, spread = tried.point, tried.tries
    assert (point.batch_size, point.input_length, point.output_length) == (3, 20, 8)
    assert tried.verdict == "holds"
    assert point.failure is None
    assert {name: len(values) for name, values in spread.items()} == {
        "response_time_ms": 2, "first_token_ms": 2, "per_token_ms": 2,
    }  # fmt: skip
    assert 0 < point.first_token_ms < point.response_time_ms
    assert point.per_token_p50_ms <= point.per_token_p90_ms <= point.per_token_p99_ms
    assert point.tokens_per_second == pytest.approx(24e3 / point.response_time_ms)
    assert point.decode_tokens_per_second == pytest.approx(3e3 / point.per_token_ms)
    weights, config = demo_model.probe.weight_bytes(), demo_model.config.language
    cache = 2 * config.num_hidden_layers * config.hidden_size * 4 * 3 * (20 + 4)
    read = weights["layers"] + weights["head"] + cache
    assert point.gigabytes_per_second == pytest.approx(read / point.per_token_ms * 1e3 / 1e9)
    ceiling = measure_ceilings("cpu", "float32").gigabytes_per_second
    assert point.bandwidth_share == pytest.approx(point.gigabytes_per_second / ceiling)
    stats = demo_model.stats()
    # The warm-up and two tries, and nothing reused between them.
    assert stats.num_computed_tokens == 3 * 3 * 19 + 3 * (4 + 8 + 8)
    assert (stats.num_reused_tokens, stats.num_preempted) == (0, 0)


def test_a_limit_is_held_against_the_mean(demo_model):
    bench = LanguageBench(demo_model, repeats=1)
    assert bench.measure(Work(1, 5, 6), max_token_latency_ms=1e9).verdict == "holds"
    assert bench.measure(Work(1, 5, 6), max_token_latency_ms=1e-9).verdict == "latency"
    assert bench.measure(Work(1, 5, 1), max_token_latency_ms=1e-9).verdict == "holds"


@pytest.mark.parametrize("limit", ["the machine", "its container"])
def test_what_would_make_the_machine_swap_is_not_begun(demo_model, monkeypatch, limit):
    if limit == "the machine":
        monkeypatch.setattr(language, "available_memory_bytes", lambda: 2**20)
    else:
        monkeypatch.setattr(cpu, "allowed_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(demo_model.probe, "submit_tokens", None)
    tried = LanguageBench(demo_model, repeats=1).measure(Work(64, 500, 100))
    assert demo_model.stats().num_blocks == 1
    assert tried.verdict == "memory"
    assert tried.point.failure == (
        "batch 64, 500 + 100 tokens: out of memory: 0.3 GiB for keys, values and a step, and "
        "0.0 GiB are available."
    )
    assert tried.point.response_time_ms is None


def without_memory_for(num_sequences, monkeypatch):
    """A device that has memory for a step of fewer sequences."""
    execute = Runner.execute

    def run_out(self, plan, *others):
        if len(plan.slices) >= num_sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(self, plan, *others)

    monkeypatch.setattr(Runner, "execute", run_out)


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_a_device_without_memory_for_a_step_is_a_point_too(demo_model, monkeypatch, num_sequences):
    without_memory_for(num_sequences, monkeypatch)
    tried = LanguageBench(demo_model, repeats=1).measure(Work(num_sequences, 6, 5))
    assert tried.verdict == "memory"
    assert "out of memory: cpu had none for a step" in tried.point.failure


def test_a_device_without_memory_for_the_cache_is_a_point_too(demo_model, monkeypatch):
    made = Runner.__init__

    def refuse_large(self, *args, num_blocks, **settings):
        if num_blocks > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made(self, *args, num_blocks=num_blocks, **settings)

    bench = LanguageBench(demo_model, repeats=1)
    assert bench.measure(Work(1, 6, 5)).verdict == "holds"
    monkeypatch.setattr(Runner, "__init__", refuse_large)
    tried = bench.measure(Work(9, 6, 5))
    assert tried.verdict == "memory"
    assert "no memory for 18 blocks" in tried.point.failure
    assert bench.measure(Work(1, 6, 5)).verdict == "holds"


def test_a_search_ends_where_memory_does_and_keeps_every_point(demo_model, monkeypatch):
    without_memory_for(6, monkeypatch)
    tried = []
    bench = LanguageBench(demo_model, repeats=1)
    search = bench.search((6, 5), (1, 16), max_token_latency_ms=1e9, on_tried=tried.append)
    assert (search.found.batch_size, search.found.limit) == (5, "memory")
    assert [each.point.batch_size for each in tried] == [1, 2, 4, 8, 6, 5]
    assert search.as_text() == (
        "6 + 5 tokens, at most 1e+09 ms for a later token: the largest batch is 5; the next larger "
        "one is out of memory (6 sizes tried)."
    )
    assert search.as_mapping()["tried"] == [1, 2, 4, 8, 6, 5]


def test_an_error_that_is_not_about_memory_is_not_hidden(demo_model, monkeypatch):
    def break_down(self, *_):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(Runner, "execute", break_down)
    with pytest.raises(ZeroDivisionError):
        LanguageBench(demo_model, repeats=1).measure(Work(1, 6, 5))
