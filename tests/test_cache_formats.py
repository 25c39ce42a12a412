"""What quantised keys and values change in answers, and what they must not change.

Batches, shared and copied blocks, preemption, beams and ranks give with them what one request
alone gives: a token's head is rounded once, by itself, and only read from there on.
"""

from dataclasses import replace
from operator import ne

import pytest
from golden_cases import GOLDENS, NAMES, SEARCHES, Golden

from minigpt4_runtime import BackendUnavailableError, ConfigError, MiniGPT4, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.devices.cpu import CpuBackend

# How many greedy answers to the golden questions of one turn, of all checkpoints together, have all
# ids of the original's. The checkpoints are small and random, so that many of their choices are
# close: bfloat16 changes some too. A float's last place, which is not the same on every machine,
# can change a rounding and so a few answers: they may vary by the second number. What a format
# costs a trained model is in docs/quantisation.md.
AGREEING = {"float16": (115, 1), "bfloat16": (99, 3), "int8": (83, 3), "int4": (17, 3)}
# The reference's, by the products of torch or of kernels/, with the instructions of SSE 4, AVX2 and
# AVX-512: always the same answers, of each request alone.
AGREEING_BY_THE_REFERENCE = 83
NUM_CASES = 117
QUANTISED = ["int8", "int4"]


def load(model_dir, cache_dtype, *, tensor_parallel=1, **engine) -> MiniGPT4:
    return MiniGPT4.load(
        model_dir, device="cpu", dtype="float32", tensor_parallel=tensor_parallel,
        engine={"cache_dtype": cache_dtype, **engine},
    )  # fmt: skip


def is_the_originals(reply, ids) -> bool:
    """Equal, or cut at a stop, behind which the original went on."""
    return list(reply.token_ids) == ids[1 : len(reply.token_ids) + 1]


def count_agreeing(golden_model_dir, cache_dtype, **engine) -> int:
    agreeing = []
    for name in NAMES:
        golden = Golden(GOLDENS / name, load(golden_model_dir(name), cache_dtype, **engine))
        cases = golden.cases("single")
        tickets = [golden.model.submit(golden.question(case), golden.sampling()) for case in cases]
        for case, ticket in zip(cases, tickets, strict=True):
            reply = list(ticket)[-1].reply
            agreeing.append(is_the_originals(reply, case["output_ids"]["greedy"]))
    assert len(agreeing) == NUM_CASES
    return sum(agreeing)


@pytest.mark.parametrize("cache_dtype", AGREEING)
def test_the_originals_greedy_answers(golden_model_dir, cache_dtype):
    measured, spread = AGREEING[cache_dtype]
    assert abs(count_agreeing(golden_model_dir, cache_dtype) - measured) <= spread


def test_the_originals_greedy_answers_by_the_reference(golden_model_dir, monkeypatch):
    facts = replace(CpuBackend.facts, attention=("reference",))
    monkeypatch.setattr(CpuBackend, "facts", facts)
    assert count_agreeing(golden_model_dir, "int8", max_running=1) == AGREEING_BY_THE_REFERENCE


ENGINES = {
    "together": {},
    "cut into chunks": {"max_step_tokens": 24, "max_running": 8},
    "odd blocks, nothing kept": {"block_size": 7, "prefix_cache": False},
    "preempted": {"num_blocks": 22, "max_running": 24},
}


def answers(golden, cases, *, at_once: bool) -> list[tuple[int, ...]]:
    """All searches of these cases: ids, each request alone or all of them together."""
    wishes = [
        (golden.question(case), golden.sampling(**search))
        for case in cases
        for search in SEARCHES.values()
    ]
    if not at_once:
        return [golden.model.chat(*wish).token_ids for wish in wishes]
    tickets = [golden.model.submit(*wish) for wish in wishes]
    return [list(ticket)[-1].reply.token_ids for ticket in tickets]


def are_alike(found, expected, cache_dtype) -> bool:
    """A number between two steps falls either way with a float's last place; of 15, a large step.

    So one of the answers to random checkpoints may differ in int4.
    """
    return sum(map(ne, found, expected)) <= (cache_dtype == "int4")


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_together_as_alone(golden_model_dir, cache_dtype):
    model_dir = golden_model_dir("vicuna")
    alone = Golden(GOLDENS / "vicuna", load(model_dir, cache_dtype, prefix_cache=False))
    cases = alone.cases("single")[:4]
    expected = answers(alone, cases, at_once=False)
    for engine in ENGINES.values():
        golden = replace(alone, model=load(model_dir, cache_dtype, **engine))
        assert are_alike(answers(golden, cases, at_once=True), expected, cache_dtype)
        if "num_blocks" in engine:
            assert golden.model.stats().num_preempted > 0


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_ranks_as_one(golden_model_dir, cache_dtype):
    model_dir = golden_model_dir("vicuna")
    alone = Golden(GOLDENS / "vicuna", load(model_dir, cache_dtype))
    cases = alone.cases("single")[:3]
    with load(model_dir, cache_dtype, tensor_parallel=2) as model:
        assert model.cache_dtype == cache_dtype
        divided = answers(replace(alone, model=model), cases, at_once=True)
    assert are_alike(divided, answers(alone, cases, at_once=True), cache_dtype)


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_the_probe_expects_what_the_cache_gives(cache_dtype):
    """All at once, and step by step, keys are rounded around the same centre, if there is one."""
    prompt, sampling = list(range(1, 90)), SamplingParams(max_new_tokens=30, ignore_eos=True)
    with load(DEMO_MODEL_DIR, "auto", max_step_tokens=32, max_running=8) as model:
        assert model._loaded.key_centre is None
        floats = model.probe.expect(prompt, prompt, image_rows={})
        model.probe.use_engine(
            {"cache_dtype": cache_dtype, "max_step_tokens": 32, "max_running": 8}
        )
        assert (model._loaded.key_centre is not None) == (cache_dtype == "int4")
        answer = list(model.probe.submit_tokens(prompt, sampling))
        expected = model.probe.expect(prompt, answer, image_rows={})
        assert expected.argmax(-1).tolist() == answer
        rounded = model.probe.expect(prompt, prompt, image_rows={})
    assert 0 < (rounded.exp() - floats.exp()).abs().max() < 0.2


@pytest.mark.parametrize(
    ("head_dim", "is_taken"), [(24, True), (12, False), (130, False), (520, False)]
)
def test_int4_is_refused_for_heads_that_int8_keeps_better(head_dim, is_taken):
    config = load_config(DEMO_MODEL_DIR)
    num_heads = config.language.num_attention_heads
    language = replace(config.language, hidden_size=head_dim * num_heads)
    engine = {"cache_dtype": "int4", "num_blocks": 16}

    def ask():
        shape = replace(config, language=language)
        with MiniGPT4.with_random_weights(shape, device="cpu", engine=engine) as model:
            return model.chat([{"role": "user", "content": "a"}], SamplingParams(max_new_tokens=3))

    if is_taken:
        assert ask().usage.completion_tokens == 3
    else:
        message = rf"a multiple of 8 up to 512, and this model's are {head_dim} wide\. Choose int8"
        with pytest.raises(ConfigError, match=message):
            ask()


def test_fp8_is_refused_where_the_device_lacks_it(golden_model_dir):
    with pytest.raises(BackendUnavailableError, match="cache_dtype is 'fp8', which cpu does not"):
        load(golden_model_dir("vicuna"), "fp8")
