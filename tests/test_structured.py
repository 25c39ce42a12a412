"""What an answer is held to, it keeps to: alone, among others, preempted, drawn, and with beams."""

import json
import re

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4_runtime import ConfigError, MiniGPT4, SamplingParams
from minigpt4_runtime.errors import GrammarError

SHAPES = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "shapes": {"type": "array", "items": {"enum": ["circle", "square"]}, "maxItems": 3},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["count", "shapes", "note"],
    "additionalProperties": False,
}
HOT = {"temperature": 3.0, "max_new_tokens": 200}


@pytest.fixture(scope="module")
def model():
    with MiniGPT4.load(device="cpu") as loaded:
        yield loaded


def ask(text):
    return [{"role": "user", "content": text}]


def submit(model, seed=0, **settings):
    return model.submit(ask("What is there?"), SamplingParams(seed=seed, **settings))


def reply_of(ticket):
    *_, last = ticket
    return last.reply


def answer(model, **settings):
    return reply_of(submit(model, **settings))


# --- any schema ---------------------------------------------------------------------------------

_plain = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-1000, 1000), st.integers(0, 1000),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}é?$"}),
    st.lists(st.sampled_from(["a", "é\n", '"###', 1, None, [1], {"x": True}]), min_size=1).map(
        lambda values: {"enum": values}
    ),
)  # fmt: skip


def _composed(inner):
    names = st.sampled_from(["a", "b c", "é", '"', "Assistant:"])
    return st.one_of(
        st.builds(
            lambda items, least, more: {
                "type": "array", "items": items, "minItems": least, "maxItems": least + more,
            },
            inner, st.integers(0, 1), st.integers(0, 2),
        ),
        st.builds(
            lambda properties, is_needed: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if is_needed],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3), st.booleans(),
        ),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    )  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(_plain, _composed, max_leaves=4), seed=st.integers(0, 99))
def test_an_answer_is_of_its_schema(model, schema, seed):
    reply = answer(model, json_schema=schema, seed=seed, **HOT)
    assert reply.finish_reason == "stop"
    jsonschema_rs.validate(schema, json.loads(reply.text))


# --- one schema ---------------------------------------------------------------------------------


def test_any_object(model):
    reply = answer(model, json_schema='{"type": "object"}', seed=3, temperature=9.0,
                   max_new_tokens=100)  # fmt: skip
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.text), dict)
    assert reply.text.startswith("{")


def test_among_others_and_preempted_as_alone(model):
    forms = [{"json_schema": SHAPES}, {"regex": "[a-z]{3,30}[0-9]{5,25}"}, {}]
    asked = [
        {**form, "num_beams": beams, "temperature": 0.0 if beams > 1 else 3.0, "max_new_tokens": 50}
        for form in forms for beams in (1, 2)
    ]  # fmt: skip
    alone = [answer(model, **each).token_ids for each in asked]
    engine = model.engine_config
    model.probe.use_engine({"num_blocks": 12, "block_size": 16, "max_running": 6})
    try:
        tickets = [submit(model, **each) for each in asked]
        together = [reply_of(ticket).token_ids for ticket in tickets]
        assert model.stats().num_preempted > 0
    finally:
        model.probe.use_engine(engine)
    assert together == alone


def test_too_much_work_ends_that_answer_alone(model):
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    tickets = [submit(model, **form) for form in ({"json_schema": many}, {"regex": "yes"})]
    with pytest.raises(GrammarError, match="too much work to follow"):
        list(tickets[0])
    assert reply_of(tickets[1]).text == "yes"


def test_a_folder_of_pictures_is_asked_nothing_where_the_form_is_at_fault(model):
    with pytest.raises(GrammarError, match="unclosed"):
        model.describe_all(["one.png"], sampling=SamplingParams(regex="["))


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_keep_to_the_form(model, num_beams):
    reply = answer(model, json_schema=SHAPES, num_beams=num_beams, max_new_tokens=120)
    assert reply.finish_reason == "stop"
    jsonschema_rs.validate(SHAPES, json.loads(reply.text))
    words = answer(model, regex="(red|blue|green) (circle|square)", num_beams=num_beams)
    assert re.fullmatch("(red|blue|green) (circle|square)", words.text)


def test_what_a_template_stops_at_is_text_here(model):
    texts = ["a###b", "Human: no Assistant: yes"]
    for text in texts:
        assert answer(model, regex=text).text == text
        assert json.loads(answer(model, json_schema={"const": text}).text) == text


def test_stop_strings_that_were_asked_for_still_end_an_answer(model):
    reply = answer(model, regex="abc### def", stop=("c#",))
    assert (reply.text, reply.finish_reason) == ("ab", "stop")


def test_max_tokens_cut_what_is_not_finished(model):
    reply = answer(model, json_schema=SHAPES, max_new_tokens=5)
    assert (len(reply.token_ids), reply.finish_reason) == (5, "length")
    with pytest.raises(json.JSONDecodeError):
        json.loads(reply.text)


def test_a_minimum_keeps_an_answer_going_as_far_as_its_form_allows(model):
    biased = {"logit_bias": {model._tokenizer.eos_id: 100}}
    assert len(answer(model, regex="[a-z]*", **biased).text) == 0
    reply = answer(model, regex="[a-z]*", min_new_tokens=9, **biased)
    assert len(reply.token_ids) == 10
    assert answer(model, regex="yes", min_new_tokens=50).text == "yes"


def test_a_stream_and_logprobs_are_those_of_the_whole(model):
    deltas = list(submit(model, json_schema=SHAPES, logprobs=1, **HOT))
    reply = deltas[-1].reply
    assert "".join(delta.text for delta in deltas) == reply.text
    assert [each.token_id for each in reply.logprobs] == list(reply.token_ids)
    plain = answer(model, json_schema=SHAPES, **HOT)
    assert plain.token_ids == reply.token_ids


def test_tokens_are_guided_too(model):
    ids = list(model.probe.submit_tokens([1], SamplingParams(regex="[0-9]{4}")))
    text = b"".join(model.token_bytes(token_id) for token_id in ids[:-1])
    assert re.fullmatch(rb" ?[0-9]{4}", text)


def test_a_form_can_be_prepared(model):
    model.prepare(SamplingParams(json_schema=SHAPES))
    model.prepare(SamplingParams())
    with pytest.raises(GrammarError, match="uniqueItems"):
        model.prepare(SamplingParams(json_schema={"type": "array", "uniqueItems": True}))


def test_a_model_on_two_ranks_keeps_to_the_form(model):
    asked = [{"json_schema": SHAPES, **HOT, "seed": seed} for seed in range(2)]
    expected = [answer(model, **each).text for each in asked]
    with MiniGPT4.load(device="cpu", tensor_parallel=2) as divided:
        tickets = [submit(divided, **each) for each in asked]
        assert [reply_of(ticket).text for ticket in tickets] == expected
    for text in expected:
        jsonschema_rs.validate(SHAPES, json.loads(text))


# --- settings -----------------------------------------------------------------------------------


def test_a_schema_may_be_a_mapping_or_text():
    params = SamplingParams(json_schema={"type": "object", "a": "é"})
    assert params.grammar == ("json_schema", json.dumps({"type": "object", "a": "é"}))
    assert SamplingParams(json_schema=params.json_schema) == params
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params
    assert SamplingParams(regex="a").grammar == ("regex", "a")
    assert SamplingParams(regex="").grammar == ("regex", "")
    assert SamplingParams().grammar is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"json_schema": 5}, "json_schema is of type int; it must be text"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"),
        ({"regex": ["a"]}, "regex is of type list"),
        ({"json_schema": "{}", "regex": "a"}, "both given"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is True"),
    ],
)
def test_forms_without_meaning_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**changes)
