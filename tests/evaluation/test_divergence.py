"""KL from the reference's model to the candidate's, over the tokens of the reference's answer."""

import math
from pathlib import Path

import pytest
import torch

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.evaluation import parity
from minigpt4_runtime.evaluation.answers import Answer, Case, LineUp
from minigpt4_runtime.evaluation.divergence import Divergence
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise
from minigpt4_runtime.report.ledger import Ledger

PICTURES = Path(__file__).parents[2] / "examples/images"
# Its answer is not so sure that rounding changes nothing.
PROMPT = "Tell me a story."
SHORT = SamplingParams(max_new_tokens=8)


def load(folder):
    return MiniGPT4.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded") / "w4a8"
    quantise(DEMO_MODEL_DIR, folder, QuantisePlan(weights="w4a8"))
    return load(folder)


def divergence(*models):
    return Divergence(*models, images_dir=PICTURES, prompt=PROMPT)


@pytest.fixture(scope="module")
def reply(demo):
    return demo.describe(PICTURES / "three.png", PROMPT, SHORT)


def case_of(reply, name="three.png", **changes):
    answer = {
        "text": reply.text, "token_ids": reply.token_ids, "num_prompt": reply.usage.prompt_tokens,
    }  # fmt: skip
    return Case(name, (Answer(**answer | changes), Answer("Something else.")))


def test_a_model_is_no_distance_from_itself(demo, reply):
    assert divergence(demo, demo).of(case_of(reply)) == 0


def heard_logits(model, monkeypatch):
    """A model's own answer, token by token from the engine, and the logits it was chosen by."""
    rows = []
    runner = model._loaded.engine._runner
    execute = runner.execute

    def listen(*given):
        logits = execute(*given)
        rows.extend(logits.tolist())
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(runner, "execute", listen)
        reply = model.describe(PICTURES / "three.png", PROMPT, SHORT)
    return reply.token_ids, rows


def softmax(logits):
    highest = max(logits)
    shares = [math.exp(each - highest) for each in logits]
    return [each / sum(shares) for each in shares]


def test_a_rounded_copy_is_as_near_as_the_engine_s_own_steps_say(demo, rounded, reply, monkeypatch):
    (ids, wanted), (same_ids, found) = (
        heard_logits(model, monkeypatch) for model in (demo, rounded)
    )
    # Both say the same, so that each step's logits are what the model expects after that answer.
    assert ids == same_ids == reply.token_ids
    assert len(wanted) == len(found) == len(ids)
    by_hand = math.fsum(
        p * math.log(p / q)
        for one, other in zip(wanted, found, strict=True)
        for p, q in zip(softmax(one), softmax(other), strict=True)
        if p
    ) / len(ids)
    kl = divergence(demo, rounded).of(case_of(reply))
    assert 0.01 < kl < 0.1
    assert kl == pytest.approx(by_hand, rel=0.01)
    assert divergence(rounded, demo).of(case_of(reply)) > 1.2 * kl


def test_parity_gives_it_and_goes_on_where_it_was(demo, rounded, reply, tmp_path):
    case, without_ids = case_of(reply), case_of(reply, "four.png", token_ids=None)
    judge = divergence(demo, rounded)

    def compare(divergence, *cases):
        ledger = Ledger(tmp_path / "parity.jsonl", keys=parity.LEDGER_KEYS)
        those = LineUp(("before", "after"), cases)
        return parity.compare(those, judge=None, ledger=ledger, divergence=divergence)

    report = compare(judge, case, without_ids)
    assert [pair.kl for pair in report.pairs] == [judge.of(case), None]
    assert report.mean_kl == report.as_mapping()["mean_kl"] == judge.of(case)
    assert report.left_out == (
        "No KL for 1 picture (four.png). The reference has no token_ids. Give what "
        "`describe --out FILE.jsonl` wrote.",
    )
    assert "KL is not known" not in report.as_text()
    assert f"KL {judge.of(case):.3g}" in report.as_page()

    class Asleep:
        name = judge.name

    assert compare(Asleep(), case).mean_kl == report.mean_kl
    assert "KL is not known: it takes both models" in compare(None, case).as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompt": 7}, r"had 7 tokens, and --prompt gives \d+\. Give the prompt"),
        ({"name": "gone.png"}, "lacks it"),
        ({"token_ids": (10**6,)}, "one or more ids from 0 to 639"),
        ({"token_ids": (5,) * 1000}, "holds 1024"),
    ],
)
def test_what_cannot_be_known_says_why(demo, reply, changes, message):
    with pytest.raises(RequestError, match=message):
        divergence(demo, demo).of(case_of(reply, **changes))


def test_numbers_that_overflow_are_no_distance(demo, reply, monkeypatch):
    weight = demo._loaded.rank_model.language.norm.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, math.inf))
    with pytest.raises(RequestError, match="numbers overflowed"):
        divergence(demo, demo).of(case_of(reply))


def test_another_model_is_no_version_of_this_one(demo, golden_model_dir):
    with pytest.raises(ConfigError, match="differ in vocabulary, template or rows"):
        divergence(demo, load(golden_model_dir("llama2")))
