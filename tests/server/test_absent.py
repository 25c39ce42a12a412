"""Null, empty and OpenAI's defaults ask for nothing; a feature that is not here has a name."""

import json
import logging

import pytest
from running import NAME, picture, user, wait_for

from minigpt4_runtime.server import absent, logs
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.protocol import ChatRequest, read_request


def read(**body):
    return read_request(
        json.dumps({"model": NAME, "messages": [user("hi")]} | body).encode(), ChatRequest
    )


@pytest.mark.parametrize(
    "name", [*absent.FEATURES, *sorted(absent.DESCRIPTIVE), "a_name_of_tomorrow"]
)
@pytest.mark.parametrize("value", [None, "", [], {}])
def test_null_and_empty_are_absent(name, value):
    if value is None or name not in ChatRequest.model_fields:
        assert read(**{name: value}) == read()
        assert read(**{name: value}).ignored == []


DEFAULTS = [(name, value) for name, values in absent.FEATURES.items() for value in values]
DEFAULTS += [
    ("parallel_tool_calls", True), ("parallel_tool_calls", False), ("service_tier", "flex"),
    ("metadata", {"a": "b"}), ("user", "me"), ("user", 5), ("top_logprobs", 0),
    ("stream_options", {}), ("stream_options", {"include_usage": False}),
    ("frequency_penalty", 0), ("presence_penalty", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DEFAULTS)
def test_what_is_openai_s_default_asks_for_nothing(name, value):
    asked = read(**{name: value})
    assert asked.sampling(0, 4096) == read().sampling(0, 4096)
    assert asked.ignored == []


@pytest.mark.parametrize("name", sorted(set(absent.FEATURES) - set(ChatRequest.model_fields)))
def test_a_feature_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(Failure) as caught:
        read(**{name: ["x"]})
    assert caught.value.param == name
    assert caught.value.code == "unsupported_parameter"


def test_what_nobody_knows_is_ignored_and_told():
    part = {"type": "text", "text": "hi", "later": 1}
    asked = read(tomorrow=1, zeta="x", messages=[user([part])], stream_options={"newer": True})
    assert asked.ignored == ["later", "newer", "tomorrow", "zeta"]
    many = read(**{f"n{i}" * 100: i for i in range(1, 100)}).ignored
    assert len(many) == 16
    assert {len(name) for name in many} == {64}


def test_the_log_tells_what_was_ignored(server, caplog):
    caplog.set_level(logging.INFO, logs.logger.name)
    assert server.ask(some_typo=1, user="me").status_code == 200

    def told():
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return [each["ignored"] for each in fields if "ignored" in each]

    wait_for(told)
    assert told() == [["some_typo"]]


ECHO = {
    "role": "assistant", "content": "Three.", "annotations": [], "audio": None,
    "function_call": None, "tool_calls": None, "refusal": None, "name": None, "id": "chatcmpl-1",
    "reasoning_content": "Let me count.", "reasoning": None,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"content": None}, {"tool_calls": []}, {"content": ...}])
def test_an_answer_that_is_sent_back_is_its_text(more):
    echo = {name: value for name, value in (ECHO | more).items() if value is not ...}
    asked = read(messages=[user("How many?"), echo, user("Sure?")])
    assert asked.ignored == []
    assert "".join(part.text for part in asked.messages[1].parts) == (echo.get("content") or "")


@pytest.mark.parametrize(
    "more",
    [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}, {"audio": {"id": "a"}}],
)
def test_what_an_answer_cannot_be_sent_back_with_is_named(more):
    with pytest.raises(Failure) as caught:
        read(messages=[user("How many?"), ECHO | more, user("Sure?")])
    assert caught.value.param == f"messages[1].{next(iter(more))}"


def test_pictures_in_every_form_clients_send(server):
    url = picture()["image_url"]["url"]
    parts = [{"type": "image_url", "image_url": url}]
    parts += [{"type": "image_url", "image_url": {"url": url, "detail": d}}
              for d in ("low", "high", "auto", None)]  # fmt: skip
    question = {"type": "text", "text": "How many shapes are there?", "annotations": []}
    answers = {server.ask(messages=[user([part, question])], max_tokens=20).text for part in parts}
    texts = {json.loads(each)["choices"][0]["message"]["content"] for each in answers}
    assert len(texts) == 1
    assert "three" in texts.pop()


def test_a_developer_and_late_system_messages_count_as_one_system_text(server):
    def prompt_tokens(*messages):
        return server.ask(messages=messages).json()["usage"]["prompt_tokens"]

    joined = prompt_tokens({"role": "system", "content": "Be brief.\nBe kind."}, user("hi"))
    brief = {"role": "developer", "content": "Be brief."}
    kind = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    assert prompt_tokens(brief, kind, user("hi")) == joined
    assert prompt_tokens(brief, user("hi"), kind) == joined != prompt_tokens(user("hi"))
