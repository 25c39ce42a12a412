"""Sequences longer than those of training: in the engine and on ranks as in the whole model."""

import random
import threading

import pytest

from minigpt4_runtime import ConfigError, MiniGPT4, PromptTooLongError, SamplingParams
from minigpt4_runtime.engine.engine import Engine

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
TRAINED = 1024  # The demo model's.


def load(**settings):
    return MiniGPT4.load(device="cpu", dtype="float32", **settings)


def draw_ids(count, seed=0):
    rng = random.Random(seed)
    return [1, *(rng.randrange(3, 600) for _ in range(count - 1))]


@pytest.mark.parametrize("rope_scaling", ["linear:2", "ntk:2", "llama3:2", "yarn:2"])
def test_long_prompts_are_answered_as_the_whole_model_computes_them(rope_scaling):
    prompt = draw_ids(TRAINED + 200)
    with load(rope_scaling=rope_scaling) as model:
        assert model.config.language.context_length == 2 * TRAINED
        answer = list(model.probe.submit_tokens(prompt, GREEDY))
        expected = model.probe.expect(prompt, answer, image_rows={})
        assert expected.argmax(-1).tolist() == answer
    with load(rope_scaling=rope_scaling, tensor_parallel=2) as model:
        assert list(model.probe.submit_tokens(prompt, GREEDY)) == answer


def test_a_limit_below_what_positions_reach():
    with load(rope_scaling="yarn:2", max_context=1500) as model:
        answer = list(model.probe.submit_tokens(draw_ids(1490), GREEDY))
        assert len(answer) == 10
        with pytest.raises(PromptTooLongError, match="1500"):
            model.probe.submit_tokens(draw_ids(1500), GREEDY)
        model.probe.use_engine({"max_running": 2})
        assert model.stats().num_blocks == 2 * -(-1500 // 16)
        with pytest.raises(PromptTooLongError, match="1500"):
            model.probe.submit_tokens(draw_ids(1500), GREEDY)


def test_what_a_model_cannot_do_is_said():
    with pytest.raises(ConfigError, match="positions of this model reach 1024 tokens"):
        load(max_context=TRAINED + 1)
    with pytest.raises(ConfigError, match="keys in the cache are already turned"):
        load(rope_scaling={"type": "dynamic", "factor": 2.0})


def test_no_python_work_grows_with_the_context():
    """Calls in each step of a long prompt, and of the answer after a short and after a long one."""
    counts, is_inside = [], False

    def count(frame, event, _):
        nonlocal is_inside
        if frame.f_code is Engine.step.__code__ and event in ("call", "return"):
            is_inside = event == "call"
            counts.append(0) if is_inside else None
        elif is_inside and event in ("call", "c_call"):
            counts[-1] += 1

    def counted(num_prompt):
        counts.clear()
        assert len(list(model.probe.submit_tokens(draw_ids(num_prompt, num_prompt), GREEDY))) == 12
        return counts.copy()

    threading.setprofile(count)  # Of threads that start from here on: the engine's.
    try:
        with load(rope_scaling="yarn:8", engine={"max_step_tokens": 256}) as model:
            counted(300)  # What is done only once.
            short, long = counted(300), counted(4100)
    finally:
        threading.setprofile(None)
    assert len(long) >= 4100 // 256 + 12
    decoding = slice(-10, -1)  # But for the last, which ends the request.
    assert max(long[decoding]) <= max(short[decoding])
    whole_chunks = long[1 : 4100 // 256]
    assert max(whole_chunks[-5:]) <= max(whole_chunks[:5])
