"""MiniGPT-v2 over HTTP: the task of a question, and replies that are not told."""

import pytest
from golden_cases import GOLDENS, Golden
from running import NAME, picture, running, user

from minigpt4_runtime import Message, MiniGPT4, SamplingParams


@pytest.fixture(scope="module")
def golden(golden_model_dir):
    model = MiniGPT4.load(golden_model_dir("minigptv2"), device="cpu", dtype="float32")
    with model:
        yield Golden(GOLDENS / "minigptv2", model)


@pytest.fixture(scope="module")
def v2_server(golden):
    with running(golden.model) as started:
        yield started


def test_a_task_is_a_word_before_the_last_question(golden, v2_server):
    answers = [
        v2_server.ask(messages=[user("[vqa] a"), {"role": "assistant", "content": "b"}, *asked],
                      max_tokens=16, **more).json()
        for asked, more in (([user([picture(), {"type": "text", "text": "c"}])], {"task": "vqa"}),
                            ([user([picture(), {"type": "text", "text": "[vqa] c"}])], {}))
    ]  # fmt: skip
    told, typed = (each["choices"][0]["message"]["content"] for each in answers)
    assert told == typed != ""
    assert answers[0]["usage"] == answers[1]["usage"]
    said = v2_server.openai().responses.create(
        model=NAME, input="c", extra_body={"task": "vqa"}, max_output_tokens=16
    )
    assert (
        said.output_text
        == golden.model.chat([Message("user", "[vqa] c")], SamplingParams(max_new_tokens=16)).text
    )


def test_a_reply_without_content_is_not_told(golden, v2_server):
    turns = [user("a"), {"role": "assistant", "content": None}, user("b")]
    answer = v2_server.ask(messages=turns).json()
    untold = [Message("user", "a"), Message("assistant", ()), Message("user", "b")]
    encoded = golden.model.encode_prompt(untold)
    assert golden.model._tokenizer.eos_id in encoded.token_ids
    assert answer["usage"]["prompt_tokens"] == len(encoded.token_ids)
    with v2_server.client() as client:
        told = client.post("/tokenize", json={"messages": turns}).json()
    assert told["tokens"] == list(encoded.token_ids)


def test_a_task_that_is_none_or_that_the_model_does_not_know(v2_server, server):
    refused = v2_server.ask(task="count")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "task"
    refused = server.ask(task="vqa")
    assert refused.status_code == 400
    assert "only MiniGPT-v2 has tasks" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "task"
    assert server.ask(task=None).status_code == 200
