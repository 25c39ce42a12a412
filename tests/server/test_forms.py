"""Answers of a given form over HTTP, and forms that would do harm."""

import json
import sys
import threading

import jsonschema_rs
import pytest
from pydantic import BaseModel
from running import NAME, user

from minigpt4_runtime.grammar import guide

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": SCHEMA}}


class Shapes(BaseModel):
    colours: tuple[str, str] | None
    is_empty: bool


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_json_of_a_schema(server):
    answer = server.ask(response_format=FORMAT, max_tokens=50, n=3, temperature=4, seed=1)
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(choice["message"]["content"]))


def test_an_answer_ends_where_the_schema_does_not_say_that_this_is_all(server):
    """As instructor, llm and LiteLLM send what pydantic writes."""
    schema = {
        "properties": {"mood": {"enum": ["good", "bad"], "title": "Mood", "type": "string"}},
        "required": ["mood"], "title": "Text", "type": "object",
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "Text", "schema": schema}}
    answer = server.ask(response_format=form, max_tokens=50)
    assert json.loads(text_of(answer)).keys() == {"mood"}


def test_a_stream_is_of_the_schema(server):
    asked = {"response_format": FORMAT, "max_tokens": 50, "stream": True}
    lines = [line for line in server.ask(**asked).text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
    text = "".join(delta.get("content", "") for delta in deltas)
    jsonschema_rs.validate(SCHEMA, json.loads(text))


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        ({"response_format": {"type": "json_object"}, "logit_bias": {"128": 100}}, {"{}"}),
        ({"structured_outputs": {"choice": ["a\nb (c)", "### d"]}}, {"a\nb (c)", "### d"}),
        ({"structured_outputs": {"regex": "[0-4]"}}, set("01234")),
        ({"guided_regex": "x|y"}, {"x", "y"}),
    ],
)
def test_every_way_to_ask_for_a_form(server, asked, texts):
    assert text_of(server.ask(max_tokens=40, **asked)) in texts


def test_the_client_parses_into_a_class(server):
    answer = server.openai().chat.completions.parse(
        model=NAME, messages=[user("hi")], response_format=Shapes, max_tokens=300, seed=1,
        temperature=0, logit_bias={"37": 20},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Shapes)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"uniqueItems": True}}}}, "response_format", "uniqueItems"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs", "unclosed"),
        ({"guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_followed_is_a_400(server, asked, param, words):
    answer = server.ask(**asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_grammar")
    assert words in error["message"]


def test_a_form_that_compiles_slowly_holds_up_no_other_question(start, monkeypatch):
    begun, may_end, found = threading.Event(), threading.Event(), []

    def try_out(source):
        begun.set()
        return "it took long" if may_end.wait(60) else ""

    monkeypatch.setattr(guide, "_try_out", try_out)
    server = start(num_workers=1)
    slow = threading.Thread(target=lambda: found.append(server.ask(guided_regex="[xy]slow")))
    slow.start()
    try:
        assert begun.wait(60)
        with server.client() as client:
            assert client.get("/health").status_code == 200
        assert server.ask(max_tokens=1).status_code == 200
        assert found == []
    finally:
        may_end.set()
        slow.join()
    assert found[0].json()["error"]["message"] == "regex cannot be followed: it took long."


def test_without_the_package_the_answer_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = server.ask(guided_regex="[ab]never asked before")
    assert answer.status_code == 503
    assert "minigpt4-runtime[structured]" in answer.json()["error"]["message"]
    assert text_of(server.ask(max_tokens=1)) is not None
