"""vLLM's own engine on model folders: the original's ids, and our engine's answers."""

import dataclasses
import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conversations import ENGINE, as_dicts
from golden_cases import GOLDENS, NAMES, Golden, assert_same_ids

from minigpt4_runtime import Message, MiniGPT4, SamplingParams, image
from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME, write_folder
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src/minigpt4_runtime/assets/demo"


@contextmanager
def served(folder, **settings):
    """vLLM with a model folder, and its end."""
    from vllm import LLM

    llm = LLM(str(folder), disable_log_stats=True, **ENGINE | settings)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def ask(llm, dialogues, max_tokens):
    """Greedy answers to dialogues that are all given at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, stop=["###"])
    return llm.chat([as_dicts(each) for each in dialogues], greedy, use_tqdm=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_original_prompts_and_ids(name, golden_model_dir):
    model = MiniGPT4.load(golden_model_dir(name), device="cpu", dtype="float32")
    golden = Golden(GOLDENS / name, model)
    cases = golden.cases("single", "multi", "events")
    dialogues = [golden.play(case)[0] for case in cases]
    with served(model.model_dir) as llm:
        answers = ask(llm, dialogues, golden.content["max_new_tokens"])
    for case, asked, answer in zip(cases, dialogues, answers, strict=True):
        assert tuple(answer.prompt_token_ids) == model.encode_prompt(asked).token_ids
        assert_same_ids(golden, tuple(answer.outputs[0].token_ids), case["output_ids"]["greedy"])
    model.close()


def hold_to_ours(folder, **settings):
    """Greedy ids of vLLM and of our engine in float32, with none, one and several pictures."""
    pictures = [image(path) for path in sorted((ROOT / "examples/images").glob("*.*"))[:3]]
    dialogues = [
        [Message("user", ("What is a cat?",))],
        [Message("user", (pictures[0], "Describe this image in detail."))],
        [Message("user", (pictures[1], pictures[2], "What is in them?"))],
    ]
    with MiniGPT4.load(folder, device="cpu", dtype="float32") as model:
        replies = [model.chat(each, SamplingParams(max_new_tokens=24)) for each in dialogues]
    with served(folder, **settings) as llm:
        answers = ask(llm, dialogues, 24)
    ours = [list(reply.token_ids) for reply in replies]
    assert [list(answer.outputs[0].token_ids) for answer in answers] == ours
    assert [answer.outputs[0].text.strip() for answer in answers] == [each.text for each in replies]


def test_the_demo_model():
    hold_to_ours(DEMO)


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16"])
def test_a_quantised_folder(name, tmp_path):
    """The demo model's shape, with heads that vLLM's attention on a CPU has, and random weights."""
    config = load_config(DEMO)
    language = dataclasses.replace(
        config.language, hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )
    config = dataclasses.replace(config, language=language)
    whole = fill_at_random(blank_model(config), device=torch.device("cpu"), dtype=torch.float32)
    write_folder(tmp_path / "float", config, whole.state_dict(), DEMO / TOKENIZER_NAME)
    plan = QuantisePlan(weights=name, group_size=32 if name == "w4a16" else None)
    quantise(tmp_path / "float", tmp_path / "model", plan)
    hold_to_ours(tmp_path / "model")


def test_two_ranks(golden_model_dir):
    hold_to_ours(golden_model_dir("llama2-gqa"), tensor_parallel_size=2)
