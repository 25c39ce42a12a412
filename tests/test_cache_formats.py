"""What quantised keys and values change in answers, and what they must not change.

Batches, shared and copied blocks, preemption, beams and ranks give with them what one request
alone gives: a token's head is rounded once, by itself, and only read from there on.
"""

from dataclasses import replace

import pytest
from golden_cases import GOLDENS, NAMES, SEARCHES, Golden

from minigpt4_runtime import BackendUnavailableError, MiniGPT4

# How many greedy answers to the golden questions of one turn, of all checkpoints together, have all
# ids of the original's. The checkpoints are small and random, so that many of their choices are
# close: bfloat16 changes some too. A float's last place, which is not the same on every machine,
# can change a rounding and so a few answers: they may vary by the second number. What a format
# costs a trained model is in docs/quantisation.md.
AGREEING = {"float16": (115, 1), "bfloat16": (99, 3), "int8": (83, 3), "int4": (13, 3)}
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


@pytest.mark.parametrize("cache_dtype", AGREEING)
def test_the_originals_greedy_answers(golden_model_dir, cache_dtype):
    agreeing = []
    for name in NAMES:
        golden = Golden(GOLDENS / name, load(golden_model_dir(name), cache_dtype))
        for case in golden.cases("single"):
            reply = golden.model.chat(golden.question(case), golden.sampling())
            agreeing.append(is_the_originals(reply, case["output_ids"]["greedy"]))
    measured, spread = AGREEING[cache_dtype]
    assert len(agreeing) == NUM_CASES
    assert abs(sum(agreeing) - measured) <= spread


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


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_together_as_alone(golden_model_dir, cache_dtype):
    model_dir = golden_model_dir("vicuna")
    alone = Golden(GOLDENS / "vicuna", load(model_dir, cache_dtype, prefix_cache=False))
    cases = alone.cases("single")[:4]
    expected = answers(alone, cases, at_once=False)
    for engine in ENGINES.values():
        golden = replace(alone, model=load(model_dir, cache_dtype, **engine))
        assert answers(golden, cases, at_once=True) == expected
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
    assert divided == answers(alone, cases, at_once=True)


def test_fp8_is_refused_where_the_device_lacks_it(golden_model_dir):
    with pytest.raises(BackendUnavailableError, match="cache_dtype is 'fp8', which cpu does not"):
        load(golden_model_dir("vicuna"), "fp8")
