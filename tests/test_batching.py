"""Whatever runs beside a request, and however it is cut: its answer is the original's.

Every golden case of one turn, with every search, all at once through engines of several shapes.
"""

import pytest
from golden_cases import GOLDENS, Golden, run_together, searches_of

from minigpt4_runtime import MiniGPT4, SamplingParams

VARIANTS = ["vicuna", "llama2-gqa"]
ENGINES = {
    "as it comes": {},
    "cut into chunks": {"max_step_tokens": 24, "max_running": 8},
    "a token at a time": {"max_step_tokens": 5, "max_running": 5},
    "nothing kept": {"prefix_cache": False, "image_cache_bytes": 0},
    "blocks of one token": {"block_size": 1},
    "odd blocks": {"block_size": 7, "max_running": 11},
}


def load(golden_model_dir, name, **engine) -> Golden:
    model = MiniGPT4.load(golden_model_dir(name), device="cpu", dtype="float32", engine=engine)
    return Golden(GOLDENS / name, model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_together_as_alone(golden_model_dir, name, engine):
    run_together(load(golden_model_dir, name, **ENGINES[engine]), most=5)


@pytest.mark.parametrize("name", VARIANTS)
def test_preempted_as_not(golden_model_dir, name):
    """The longest prompt alone nearly fills the cache: the others push each other out."""
    golden = load(golden_model_dir, name)
    cases = golden.cases("single")[:8]
    longest = max(len(golden.model.encode_prompt(golden.question(c)).token_ids) for c in cases)
    num_blocks = -(-longest // 16) + 5 * 3
    golden = load(golden_model_dir, name, num_blocks=num_blocks)
    run_together(golden, most=8)
    assert golden.model.stats().num_preempted > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_as_computed(golden_model_dir, name):
    golden = load(golden_model_dir, name)
    run_together(golden, most=6)
    before = golden.model.stats()
    run_together(golden, most=6)
    after = golden.model.stats()
    assert after.num_encoded_images == before.num_encoded_images
    whole_blocks = sum(
        (len(golden.model.encode_prompt(golden.question(case)).token_ids) - 1) // 16 * 16
        for case in golden.cases("single")[:6]
        for _ in searches_of(case)
    )
    assert after.num_reused_tokens - before.num_reused_tokens == whole_blocks


def test_drawn_together_as_alone(golden_model_dir):
    """The same request with the same seed draws the same, whatever it shares its steps with."""
    golden = load(golden_model_dir, "vicuna", prefix_cache=False)
    question = golden.question(golden.cases("single")[0])
    wishes = [
        SamplingParams(
            max_new_tokens=12,
            temperature=0.5 + seed % 3,
            top_p=1.0 - 0.2 * (seed % 2),
            top_k=30 * (seed % 4),
            repetition_penalty=1.0 + 0.1 * (seed % 2),
            stop=(),
            seed=seed,
        )
        for seed in range(24)
    ]
    alone = [golden.model.chat(question, wish).token_ids for wish in wishes]
    tickets = [golden.model.submit(question, wish) for wish in wishes]
    together = [list(ticket)[-1].reply.token_ids for ticket in tickets]
    assert together == alone
    assert len(set(alone)) > 12


def test_the_second_turn_computes_only_what_is_new(golden_model_dir):
    golden = load(golden_model_dir, "vicuna")
    asked = golden.question(golden.cases("single")[0])
    first = golden.model.chat(asked, golden.sampling())
    before = golden.model.stats()
    further = [*asked, {"role": "assistant", "content": first.text}]
    further.append({"role": "user", "content": "And what else?"})
    second = golden.model.chat(further, golden.sampling())
    after = golden.model.stats()
    num_new = second.usage.prompt_tokens - first.usage.prompt_tokens
    num_computed = after.num_computed_tokens - before.num_computed_tokens
    # An answer's last token is not computed, and up to a block of what was known may be.
    assert num_computed <= num_new + second.usage.completion_tokens + 16
    assert after.num_encoded_images == before.num_encoded_images
    fresh = load(golden_model_dir, "vicuna", prefix_cache=False)
    assert fresh.model.chat(further, golden.sampling()) == second


def test_two_pictures_are_not_taken_for_one_another(golden_model_dir):
    """Their placeholder ids are the same: only the digests in the keys tell them apart."""
    golden, fresh = (
        load(golden_model_dir, "vicuna", prefix_cache=keeps) for keeps in (True, False)
    )
    cases = golden.cases("single")
    names = sorted({name for case in cases for name in case["images"]})
    for name in names:
        question = golden.question({"images": [name], "turns": ["What is this?"]})
        again = fresh.question({"images": [name], "turns": ["What is this?"]})
        assert golden.model.chat(question, golden.sampling()) == fresh.model.chat(
            again, golden.sampling()
        )
    assert len(names) > 1
