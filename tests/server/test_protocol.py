"""What may be asked, and how each wrong question is turned down."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import NAME, picture, user

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.protocol import ChatRequest, read_request


def read(**body):
    return read_request(
        json.dumps({"model": NAME, "messages": [user("hi")]} | body).encode(), ChatRequest
    )


def sampling(choice=0, **body):
    return read(**body).sampling(choice, 4096)


def test_every_setting_becomes_its_sampling_param():
    assert sampling() == SamplingParams()
    asked = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "repetition_penalty": 1.2, "stop": ["a", "b"], "seed": 5,
        "logprobs": True, "top_logprobs": 4,
        "min_p": 0.1, "presence_penalty": 1.5, "frequency_penalty": -0.5,
        "logit_bias": {"12": -100, "7": 1.5},
    }  # fmt: skip
    assert sampling(**asked) == SamplingParams(
        max_new_tokens=9, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=3,
        repetition_penalty=1.2, stop=("a", "b"), seed=5, logprobs=4,
        min_p=0.1, presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={7: 1.5, 12: -100},
    )  # fmt: skip
    assert sampling(num_beams=3) == SamplingParams(num_beams=3)
    beams = sampling(num_beams=3, length_penalty=0.5)
    assert beams == SamplingParams(num_beams=3, length_penalty=0.5)
    assert sampling(stop="a").stop == ("a",)
    assert sampling(stop=[]).stop is sampling(stop="").stop is sampling(stop=[""]).stop is None
    assert sampling(stop=["a", ""]).stop == ("a",)
    assert sampling(logprobs=True).logprobs == 0
    assert sampling(logprobs=False).logprobs is None
    assert sampling(max_tokens=7, max_completion_tokens=7).max_new_tokens == 7
    assert sampling(min_tokens=400).max_new_tokens == 400
    assert read().sampling(0, 100).max_new_tokens == 100


SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "strict": True, "description": "y", "schema": SCHEMA}}},
         ("json_schema", SCHEMA)),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", "no?"]}}, ("regex", r"yes|no\?")),
        ({"guided_regex": "a+"}, ("regex", "a+")),
    ],
)  # fmt: skip
def test_the_form_of_an_answer_becomes_one_grammar(body, grammar):
    found = sampling(**body).grammar
    if found is not None and found[0] == "json_schema":
        assert list(json.loads(found[1])) == list(grammar[1])  # The order is that of the answer.
        found = ("json_schema", json.loads(found[1]))
    assert found == grammar


@settings(deadline=None)
@given(st.text(max_size=8))
def test_a_choice_is_matched_as_it_stands(text):
    _, regex = sampling(structured_outputs={"choice": [text]}).grammar
    assert re.fullmatch(regex, text)


def test_choices_have_seeds_of_their_own():
    assert [sampling(choice, seed=3).seed for choice in range(3)] == [3, 4, 5]
    assert sampling(1, seed=2**63 - 1).seed == 0
    assert sampling(1).seed is None


def test_null_is_as_good_as_nothing():
    names = set(ChatRequest.model_fields) - read().model_fields_set
    assert sampling(**dict.fromkeys(names)) == SamplingParams()


def test_penalties_of_zero_and_no_biases_mean_nothing():
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "min_p": 0, "logit_bias": {}}
    assert sampling(**nothing) == SamplingParams()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "missing"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex",
         "response_format and guided_regex: give one form"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "give one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "not supported"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag",
         "not supported"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "says where to end"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "valid integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"-5": 1}}, "logit_bias.-5", "greater than or equal to 0"),
        ({"logit_bias": {str(each): 1 for each in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logit_bias": {str(2**64): 1}}, "logit_bias", "too large"),
        ({"num_beams": 2, "logit_bias": {str(2**64): 1}}, "logit_bias", "too large"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"num_beams": 2, "min_p": 0.1}, "num_beams", "does not sample"),
        ({"model": None}, "model", "model is missing"),
        ({"model": 5}, "model", "valid string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid array"),
        ({"messages": [user("hi")] * 1025}, "messages", "at most 1024"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "'system'"),
        ({"messages": [user(None)]}, "messages[0].content", "missing"),
        ({"messages": [user(5)]}, "messages[0].content", "valid"),
        ({"messages": [user([5])]}, "messages[0].content[0]", "an object"),
        ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0].text", "missing"),
        ({"messages": [user([{"type": "text", "text": 5}])]}, "messages[0].content[0].text",
         "valid string"),
        ({"messages": [user([{"type": "input_audio"}])]}, "messages[0].content[0]",
         "'input_audio'"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": 5}}])]},
         "messages[0].content[0].image_url.url", "valid string"),
        ({"messages": [user([{"type": "image_url", "image_url": 5}])]},
         "messages[0].content[0].image_url", "an object"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": True}, "top_p", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "this server allows 4096"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "different things"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "above max_tokens 5"),
        ({"min_tokens": 5000}, "max_tokens", "allows 4096"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["x" * 257]}, "stop[0]", "at most 256"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"temperature": 1e300}, "temperature", "must be a number"),
        ({"top_k": 2**64}, "top_k", "too large"),
        ({"temperature": 1e308}, "temperature", "too large"),
        ({"length_penalty": 2}, "length_penalty", "needs num_beams"),
        ({"num_beams": 2, "temperature": 1}, "num_beams", "does not sample"),
        ({"num_beams": 2, "logprobs": True}, "num_beams", "gives no logprobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body, param, words):
    with pytest.raises(Failure) as caught:
        sampling(**body)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b'{"a":1,}', b"[" * 100_000,
        b'{"model":' * 50_000, b'{"model": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"temperature": NaN}', b'{"temperature": 1e999}', b'{"temperature": -Infinity}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(Failure) as caught:
        read_request(body, ChatRequest)
    assert caught.value.status == 400


def test_nested_values_in_the_place_of_a_message_are_refused():
    inner = "[" * 5000 + "]" * 5000
    with pytest.raises(Failure):
        read_request(b'{"model": "m", "messages": ' + inner.encode() + b"}", ChatRequest)


def test_a_picture_s_url_is_a_string_in_an_object():
    assert read(messages=[user([picture()])]).messages[0].content[0].image_url.url
